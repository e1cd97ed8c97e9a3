//! Which addresses the daemon connects to on somebody else's word: a user names the registry, and the registry names
//! token realms and redirects. None of them may lead the daemon into the site's own networks, or to itself.
//!
//! Invariant: an address is judged where it is connected to, as resolved, so that a name that changes its mind between
//! two look-ups gains nothing. What goes through a proxy is the proxy's to judge, but for addresses written out.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use berth_config::Network;
use reqwest::Url;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};

use super::error::RegistryError;

/// Where one registry's client may connect to.
#[derive(Debug, Clone)]
pub(super) struct Guard {
    networks: Arc<[Network]>,
    /// The registry's own name, where the site's configuration names it: it may lie anywhere.
    trusted: Option<String>,
    /// Names of proxies that the environment sets for the daemon.
    proxies: Arc<[String]>,
}

/// An address that is neither public nor in a network that the site names.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` has the address {address}, which is not a public one")]
pub(super) struct Forbidden {
    pub(super) name: String,
    pub(super) address: IpAddr,
}

impl Guard {
    /// `trusted` is the registry's own host, without port, if the configuration has a section for it.
    pub(super) fn new(networks: &[Network], trusted: Option<&str>) -> Self {
        Self {
            networks: networks.into(),
            trusted: trusted.map(str::to_ascii_lowercase),
            proxies: proxies(),
        }
    }

    fn may(&self, address: IpAddr) -> bool {
        is_public(address) || self.networks.iter().any(|n| n.contains(address))
    }

    /// Looks at a URL whose host is an address: no look-up will follow.
    pub(super) fn check(&self, url: &Url) -> Result<(), RegistryError> {
        let host = url.host_str().unwrap_or_default();
        let bare = host.trim_matches(['[', ']']);
        let Ok(address) = bare.parse::<IpAddr>() else {
            return Ok(());
        };
        if self.trusted.as_deref() == Some(bare) || self.may(address) {
            return Ok(());
        }
        Err(Forbidden {
            name: host.into(),
            address,
        }
        .into())
    }

    fn choose(&self, name: &str, found: Vec<IpAddr>) -> Result<Vec<IpAddr>, Forbidden> {
        let is = |known: &str| known.eq_ignore_ascii_case(name);
        if self.trusted.as_deref().is_some_and(is) || self.proxies.iter().any(|p| is(p)) {
            return Ok(found);
        }
        let (good, bad): (Vec<_>, Vec<_>) = found.into_iter().partition(|a| self.may(*a));
        match (good.is_empty(), bad.first()) {
            (true, Some(address)) => Err(Forbidden {
                name: name.into(),
                address: *address,
            }),
            _ => Ok(good),
        }
    }
}

impl Resolve for Guard {
    fn resolve(&self, name: Name) -> Resolving {
        let guard = self.clone();
        Box::pin(async move {
            let name = name.as_str().to_owned();
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let good = guard.choose(&name, found.map(|a| a.ip()).collect())?;
            let addresses: Addrs = Box::new(good.into_iter().map(|ip| (ip, 0).into()));
            Ok(addresses)
        })
    }
}

/// The guard's refusal inside an error of the HTTP library.
pub(super) fn forbidden(error: &reqwest::Error) -> Option<Forbidden> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(found) = error.downcast_ref::<Forbidden>() {
            return Some(found.clone());
        }
        cause = error.source();
    }
    None
}

/// Whether an address is one of the public internet (IANA's special-purpose address registries). An address that
/// carries an IPv4 one in it is as public as that.
fn is_public(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => is_public_v4(v4),
        IpAddr::V6(v6) => is_public_v6(v6),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    !(address.is_private()
        || address.is_loopback()
        || address.is_link_local()
        || address.is_multicast()
        || address.is_documentation()
        || a == 0
        || a >= 240
        || (a == 100 && (64..128).contains(&b))
        || (a == 192 && b == 0 && c == 0)
        || (a == 198 && (18..20).contains(&b)))
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    let s = address.segments();
    let embedded = |high: u16, low: u16| Ipv4Addr::from(u32::from(high) << 16 | u32::from(low));
    match s {
        // 64:ff9b::/96 (NAT64) and 2002::/16 (6to4) carry an IPv4 address.
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] | [0x2002, high, low, ..] => {
            is_public_v4(embedded(high, low))
        }
        // Of 2000::/3, all that is given out: without Teredo and the like, and documentation.
        [0x2001, second, ..] => second >= 0x200 && second != 0xdb8,
        [0x3fff, second, ..] => second >= 0x1000,
        [first, ..] => first & 0xe000 == 0x2000,
    }
}

/// The hosts of the proxies that the HTTP library takes from the environment.
fn proxies() -> Arc<[String]> {
    let names = ["http_proxy", "https_proxy", "all_proxy"];
    let set = names
        .iter()
        .flat_map(|name| [(*name).to_owned(), name.to_ascii_uppercase()])
        .filter_map(|name| std::env::var(name).ok());
    set.filter_map(|value| {
        let url = Url::parse(&value).ok().filter(Url::has_host);
        let url = url.or_else(|| Url::parse(&format!("http://{value}")).ok());
        url?.host_str().map(str::to_owned)
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_internet_is_public() {
        for inside in [
            "127.0.0.1",
            "10.1.2.3",
            "172.31.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "224.0.0.1",
            "255.255.255.255",
            "198.18.0.1",
            "::1",
            "::",
            "fe80::1",
            "fc00::1",
            "ff02::1",
            "::ffff:10.0.0.1",
            "64:ff9b::a00:1",
            "2002:7f00:1::",
            "2001::1",
            "2001:db8::1",
            "fec0::1",
        ] {
            assert!(!is_public(inside.parse().unwrap()), "{inside}");
        }
        for outside in [
            "8.8.8.8",
            "172.32.0.1",
            "100.128.0.1",
            "192.0.1.1",
            "2606:4700::1",
            "2001:4860:4860::8888",
            "64:ff9b::808:808",
            "2002:808:808::",
        ] {
            assert!(is_public(outside.parse().unwrap()), "{outside}");
        }
    }

    #[test]
    fn a_name_keeps_its_good_addresses_and_is_refused_when_it_has_none() {
        let public: IpAddr = "8.8.8.8".parse().unwrap();
        let private: IpAddr = "10.0.0.9".parse().unwrap();
        let guard = Guard::new(&[], None);
        assert_eq!(
            guard.choose("r.example", vec![private, public]),
            Ok(vec![public])
        );
        let e = guard.choose("r.example", vec![private]).unwrap_err();
        assert_eq!(e.address, private);
        let trusted = Guard::new(&[], Some("r.example"));
        assert!(trusted.choose("R.example", vec![private]).is_ok());
        assert!(trusted.choose("other.example", vec![private]).is_err());
        let network = Guard::new(&["10.0.0.0/8".parse().unwrap()], None);
        assert!(network.choose("r.example", vec![private]).is_ok());
    }

    #[test]
    fn an_address_in_every_spelling_is_looked_at() {
        let guard = Guard::new(&[], None);
        for url in [
            "http://127.1/v2/",
            "http://0x7f000001/",
            "http://2130706433/",
            "http://[::ffff:127.0.0.1]/",
            "https://[::1]:5000/",
        ] {
            assert!(guard.check(&Url::parse(url).unwrap()).is_err(), "{url}");
        }
        assert!(
            guard
                .check(&Url::parse("https://8.8.8.8/").unwrap())
                .is_ok()
        );
        let trusted = Guard::new(&[], Some("127.0.0.1"));
        assert!(
            trusted
                .check(&Url::parse("http://127.0.0.1:5000/").unwrap())
                .is_ok()
        );
        assert!(
            trusted
                .check(&Url::parse("http://127.0.0.2:5000/").unwrap())
                .is_err()
        );
    }
}
