//! Requests for `http:` by a proxy in absolute form (RFC 9112, section 3.2.2). ureq itself opens a tunnel through a
//! proxy for everything, in which no proxy can cache.

use std::sync::Arc;

use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, Either, NextTimeout, TcpConnector, Transport,
};
use ureq::{Agent, Error};

/// An agent whose requests all go to `proxy`, `http://HOST[:PORT]`.
pub(super) fn agent(config: Config, proxy: &str) -> Result<Agent, String> {
    let uri: Uri = proxy.parse().map_err(|error| format!("proxy: {error}"))?;
    if uri.scheme_str() != Some("http") || uri.host().is_none() {
        return Err("a proxy is http://HOST:PORT".to_owned());
    }
    let connector = ().chain(TcpConnector::default()).chain(AbsoluteForm);
    Ok(Agent::with_parts(config, connector, ProxyAddress(uri)))
}

/// Finds the proxy, whoever is asked for.
#[derive(Debug)]
struct ProxyAddress(Uri);

impl Resolver for ProxyAddress {
    fn resolve(
        &self,
        _uri: &Uri,
        config: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, Error> {
        DefaultResolver::default().resolve(&self.0, config, timeout)
    }
}

#[derive(Debug)]
struct AbsoluteForm;

impl<In: Transport> Connector<In> for AbsoluteForm {
    type Out = Either<In, Absolute<In>>;

    fn connect(
        &self,
        details: &ConnectionDetails<'_>,
        chained: Option<In>,
    ) -> Result<Option<Self::Out>, Error> {
        let authority = details.uri.authority();
        let authority = authority.map_or("", |authority| authority.as_str());
        Ok(chained.map(|inner| {
            Either::B(Absolute {
                inner,
                server: format!("http://{authority}").into(),
            })
        }))
    }
}

/// Writes the server's name into the first line of each request. What goes out is heads, and the
/// bodies of traces, which are JSON and begin with no method.
#[derive(Debug)]
struct Absolute<T> {
    inner: T,
    server: Arc<str>,
}

/// Up to the `/` of the path.
const METHODS: [&[u8]; 2] = [b"GET /", b"PUT /"];

impl<T: Transport> Transport for Absolute<T> {
    fn buffers(&mut self) -> &mut dyn Buffers {
        self.inner.buffers()
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        let output = self.inner.buffers().output();
        let (server, path) = (self.server.as_bytes(), METHODS[0].len() - 1);
        let is_head = METHODS
            .iter()
            .any(|method| output[..amount].starts_with(method));
        if !is_head || amount + server.len() > output.len() {
            return self.inner.transmit_output(amount, timeout);
        }
        output.copy_within(path..amount, path + server.len());
        output[path..path + server.len()].copy_from_slice(server);
        self.inner.transmit_output(amount + server.len(), timeout)
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        self.inner.await_input(timeout)
    }

    fn is_open(&mut self) -> bool {
        self.inner.is_open()
    }
}
