//! `api.url`: where a site's daemons listen, as one URL or a list of them.

use std::collections::HashSet;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};
use serde::ser::{Serialize, Serializer};

/// Most daemons of a site. Each is asked at a start on demand, and each costs time where it does not answer.
pub const MOST: usize = 8;

/// URLs in the order in which they are asked; none where nothing is configured.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Urls(Vec<String>);

impl Urls {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }

    /// What cannot work, if something cannot.
    pub(crate) fn problem(&self) -> Option<String> {
        if self.0.len() > MOST {
            return Some(format!("must be at most {MOST} URLs"));
        }
        let spoken = |url: &str| url.starts_with("http://") || url.starts_with("https://");
        if self.iter().any(|url| !spoken(url)) {
            return Some("must start with http:// or https://".into());
        }
        let bare = |url: &String| url.trim_end_matches('/').to_owned();
        let mut seen = HashSet::new();
        let twice = self.0.iter().find(|url| !seen.insert(bare(url)));
        twice.map(|url| format!("names {url} twice"))
    }
}

impl From<Vec<String>> for Urls {
    fn from(urls: Vec<String>) -> Self {
        Self(urls)
    }
}

impl From<&str> for Urls {
    fn from(url: &str) -> Self {
        Self(vec![url.to_owned()])
    }
}

impl fmt::Display for Urls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(", "))
    }
}

/// One is written as it is mostly typed, without a list around it.
impl Serialize for Urls {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.0[..] {
            [url] => serializer.serialize_str(url),
            urls => urls.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Urls {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(OneOrMore)
    }
}

struct OneOrMore;

impl<'de> Visitor<'de> for OneOrMore {
    type Value = Urls;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("api.url to be a URL or a list of URLs")
    }

    fn visit_str<E: Error>(self, url: &str) -> Result<Urls, E> {
        Ok(Urls::from(url))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Urls, A::Error> {
        let mut urls = Vec::new();
        while let Some(url) = list.next_element()? {
            urls.push(url);
        }
        match urls.is_empty() {
            true => Err(A::Error::custom("api.url names no daemon: leave it out")),
            false => Ok(Urls(urls)),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::Config;

    fn read(text: &str) -> Result<Vec<String>, String> {
        let config = Config::parse(&format!("[api]\nurl = {text}\n"))?;
        if let Some(problem) = config.problems().first() {
            return Err(problem.to_string());
        }
        let again = toml::to_string(&config).unwrap();
        assert_eq!(Config::parse(&again).unwrap(), config, "{again}");
        Ok(config.api.url.iter().map(str::to_owned).collect())
    }

    #[test]
    fn one_url_or_several_are_read_and_written() {
        assert_eq!(read("'http://a:1'").unwrap(), ["http://a:1"]);
        let both = read("['https://a', 'http://b:2/']").unwrap();
        assert_eq!(both, ["https://a", "http://b:2/"]);
        let one = toml::to_string(&Config::parse("[api]\nurl = ['http://a']").unwrap()).unwrap();
        assert!(one.contains("url = \"http://a\""), "{one}");
        assert!(Config::default().api.url.is_empty());
    }

    #[test]
    fn what_is_wrong_names_the_key() {
        let many: Vec<_> = (0..9).map(|n| format!("'http://h{n}'")).collect();
        let many = format!("[{}]", many.join(", "));
        for (text, why) in [
            ("7", "expected api.url to be a URL or a list of URLs"),
            ("[]", "api.url names no daemon"),
            ("'berth.site'", "api.url: must start with http://"),
            ("['http://a', 'b']", "api.url: must start with http://"),
            (
                "['http://a', 'http://a/']",
                "api.url: names http://a/ twice",
            ),
            (&many, "api.url: must be at most 8 URLs"),
        ] {
            let error = read(text).unwrap_err();
            assert!(
                error.contains(why) && !error.contains('\n'),
                "{text}: {error}"
            );
        }
        assert!(read(&many.replace(", 'http://h8'", "")).is_ok());
    }
}
