//! `WWW-Authenticate` (RFC 9110, section 11.6.1; distribution's token authentication): what a registry wants to see.

/// What a registry asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Challenge {
    Basic,
    Bearer {
        realm: String,
        service: Option<String>,
        scope: Option<String>,
    },
}

/// Longest header looked at, in bytes.
const MAX: usize = 8192;

/// The challenge to answer: the first Bearer one, else Basic. `None` when there is neither.
pub fn choose<'a>(headers: impl Iterator<Item = &'a str>) -> Option<Challenge> {
    let mut basic = None;
    for header in headers.filter(|h| h.len() <= MAX) {
        let (scheme, rest) = header.trim().split_once(' ').unwrap_or((header.trim(), ""));
        if scheme.eq_ignore_ascii_case("basic") {
            basic = Some(Challenge::Basic);
        } else if scheme.eq_ignore_ascii_case("bearer")
            && let Some(bearer) = bearer(rest)
        {
            return Some(bearer);
        }
    }
    basic
}

fn bearer(parameters: &str) -> Option<Challenge> {
    let (mut realm, mut service, mut scope) = (None, None, None);
    for (name, value) in Parameters(parameters) {
        match name.to_ascii_lowercase().as_str() {
            "realm" => realm = Some(value),
            "service" => service = Some(value),
            "scope" => scope = Some(value),
            _ => {}
        }
    }
    Some(Challenge::Bearer {
        realm: realm?,
        service,
        scope,
    })
}

/// `name=value` or `name="va\"lue"`, divided by commas.
struct Parameters<'a>(&'a str);

impl Iterator for Parameters<'_> {
    type Item = (String, String);

    fn next(&mut self) -> Option<Self::Item> {
        let (name, rest) = self.0.split_once('=')?;
        let name = name.trim_matches([' ', ',', '\t']).to_owned();
        let mut value = String::new();
        let mut chars = rest.char_indices();
        let mut end = rest.len();
        let quoted = rest.starts_with('"');
        if quoted {
            chars.next();
        }
        while let Some((at, c)) = chars.next() {
            match c {
                '\\' if quoted => value.extend(chars.next().map(|(_, c)| c)),
                '"' if quoted => {
                    end = at + 1;
                    break;
                }
                ',' if !quoted => {
                    end = at;
                    break;
                }
                c => value.push(c),
            }
        }
        self.0 = &rest[end..];
        Some((name, value.trim_end().to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bearer_wins_and_its_parameters_are_read() {
        let headers = [
            "Basic realm=\"x\"",
            r#"Bearer realm="https://auth.example/token",service=reg, scope="repository:a/b:pull,push",error="invalid \"x\"""#,
        ];
        assert_eq!(
            choose(headers.into_iter()),
            Some(Challenge::Bearer {
                realm: "https://auth.example/token".into(),
                service: Some("reg".into()),
                scope: Some("repository:a/b:pull,push".into()),
            })
        );
        assert_eq!(choose(["basic"].into_iter()), Some(Challenge::Basic));
    }

    #[test]
    fn rubbish_is_no_challenge() {
        for header in [
            "",
            "Bearer",
            "Bearer =",
            "Bearer realm",
            "Negotiate abc",
            "Bearer \"\\",
        ] {
            assert_eq!(choose([header].into_iter()), None, "{header}");
        }
    }
}
