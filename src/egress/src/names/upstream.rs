//! The upstream resolvers: which they are, and how they are asked.
//!
//! Guarantees: each question has a random port, a random id and random case, and an answer that lacks one of them is
//! not believed; a truncated answer is asked for again by TCP; a question ends within a time limit. The library
//! keeps no answers of its own, so that those of the cache are the only ones. An upstream resolver that is ourselves
//! is refused; a loop by way of others ends here too, because only guests are answered.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use tokio::time::timeout;

use super::answer::{Answer, Found, Key};
use super::limits::{
    ANSWER_TIMEOUT, UPSTREAM_RETRIES, UPSTREAM_TCP_QUESTIONS_MAX, UPSTREAM_TIMEOUT, UPSTREAMS_MAX,
};

/// The port of DNS.
const DNS_PORT: u16 = 53;

/// The reason why there is no upstream resolver.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    #[error("no upstream resolver is configured")]
    None,
    #[error("{0} upstream resolvers are configured; there may be {most}", most = UPSTREAMS_MAX)]
    TooMany(usize),
    #[error("the upstream resolver {0} is this resolver itself")]
    Ourselves(SocketAddr),
    #[error("the upstream resolver {0} is not the address of one host")]
    NotAHost(SocketAddr),
    #[error("cannot prepare the upstream resolvers")]
    Library(#[source] Box<NetError>),
}

/// Returns the addresses of the resolvers in a text like that of resolv.conf, at most [`UPSTREAMS_MAX`] as the C
/// libraries do. Lines that are not understood are skipped.
#[must_use]
pub fn upstreams_of(resolv_conf: &str) -> Vec<SocketAddr> {
    let address = |line: &str| {
        let mut words = line.split_whitespace();
        let is_server = words.next() == Some("nameserver");
        words.next().filter(|_| is_server)?.parse::<IpAddr>().ok()
    };
    let addresses = resolv_conf.lines().filter_map(address);
    addresses.map(|address| SocketAddr::new(address, DNS_PORT)).take(UPSTREAMS_MAX).collect()
}

/// Checks the addresses of upstream resolvers. `own` are the addresses at which this resolver is asked.
fn check(addresses: &[SocketAddr], own: &[SocketAddr]) -> Result<(), UpstreamError> {
    if addresses.is_empty() {
        return Err(UpstreamError::None);
    }
    if addresses.len() > UPSTREAMS_MAX {
        return Err(UpstreamError::TooMany(addresses.len()));
    }
    for address in addresses {
        let ip = address.ip().to_canonical();
        let is_broadcast = matches!(ip, IpAddr::V4(ip) if ip.is_broadcast());
        if ip.is_unspecified() || ip.is_multicast() || is_broadcast || address.port() == 0 {
            return Err(UpstreamError::NotAHost(*address));
        }
        if own.iter().any(|own| is_reached_at(*own, ip, address.port())) {
            return Err(UpstreamError::Ourselves(*address));
        }
    }
    Ok(())
}

/// Returns whether a socket at `own` receives what is sent to an address of this host.
fn is_reached_at(own: SocketAddr, ip: IpAddr, port: u16) -> bool {
    let is_local = own.ip().to_canonical() == ip || (own.ip().is_unspecified() && ip.is_loopback());
    own.port() == port && is_local
}

/// Times for which upstream resolvers are waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UpstreamTimes {
    /// Time for one attempt; there are two.
    pub attempt: Duration,
    /// Time for an answer, with all attempts and aliases.
    pub answer: Duration,
}

impl Default for UpstreamTimes {
    fn default() -> Self {
        Self { attempt: UPSTREAM_TIMEOUT, answer: ANSWER_TIMEOUT }
    }
}

/// The upstream resolvers.
#[derive(Debug, Clone)]
pub struct Upstream {
    resolver: TokioResolver,
    answer_time: Duration,
}

impl Upstream {
    /// Prepares to ask the resolvers with these addresses; `own` are the addresses at which this resolver is asked.
    ///
    /// # Errors
    /// Fails if there is none, there are too many, or one is this resolver itself or not the address of one host.
    pub fn new(
        addresses: &[SocketAddr],
        own: &[SocketAddr],
        times: UpstreamTimes,
    ) -> Result<Self, UpstreamError> {
        check(addresses, own)?;
        let servers = addresses.iter().map(|address| {
            let mut server = NameServerConfig::udp_and_tcp(address.ip());
            for connection in &mut server.connections {
                connection.port = address.port();
            }
            server
        });
        let config = ResolverConfig::from_name_servers(servers.collect());
        let mut builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
        configure(builder.options_mut(), times);
        let resolver = builder.build().map_err(|error| UpstreamError::Library(Box::new(error)))?;
        Ok(Self { resolver, answer_time: times.answer })
    }

    /// Asks, and returns the answer, which is a failure if nobody gives one in time.
    pub(crate) async fn ask(&self, key: &Key) -> Answer {
        let asked = self.resolver.lookup(key.name.clone(), key.record_type);
        match timeout(self.answer_time, asked).await {
            Ok(Ok(lookup)) => Answer::from_records(key, lookup.answers()),
            Ok(Err(error)) => absence(&error).unwrap_or_else(|| {
                tracing::debug!(%error, "an upstream resolver gave no answer");
                Answer::failure()
            }),
            Err(_) => Answer::failure(),
        }
    }
}

fn configure(options: &mut ResolverOpts, times: UpstreamTimes) {
    options.timeout = times.attempt;
    options.attempts = UPSTREAM_RETRIES;
    options.max_active_requests = UPSTREAM_TCP_QUESTIONS_MAX;
    options.cache_size = 0;
    options.use_hosts_file = ResolveHosts::Never;
    options.case_randomization = true;
    options.preserve_intermediates = true;
}

/// Returns the answer for an error that means that there is no such name or record.
fn absence(error: &NetError) -> Option<Answer> {
    let NetError::Dns(DnsError::NoRecordsFound(absence)) = error else { return None };
    match absence.response_code {
        ResponseCode::NXDomain => Some(Answer::negative(Found::NoSuchName, absence.negative_ttl)),
        ResponseCode::NoError => Some(Answer::negative(Found::Empty, absence.negative_ttl)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sockets(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| text.parse().expect("an address")).collect()
    }

    #[test]
    fn name_servers_are_read_from_a_resolv_conf() {
        let text = "# a comment\nsearch example.com\nnameserver 192.0.2.1\n  nameserver\t2001:db8::1 \nnameserver x\n\
                    ;nameserver 192.0.2.9\nnameserver\noptions edns0\nnameserver 192.0.2.2\nnameserver 192.0.2.3\n";
        let expected = sockets(&["192.0.2.1:53", "[2001:db8::1]:53", "192.0.2.2:53"]);
        assert_eq!(upstreams_of(text), expected);
        assert_eq!(upstreams_of(""), []);
    }

    #[test]
    fn an_upstream_resolver_that_is_ourselves_is_refused() {
        let is_loop = |own: &str, upstream: &str| {
            let checked = check(&sockets(&[upstream]), &sockets(&[own]));
            matches!(checked, Err(UpstreamError::Ourselves(_)))
        };
        assert!(is_loop("10.100.0.1:53", "10.100.0.1:53"));
        assert!(is_loop("10.100.0.1:53", "[::ffff:10.100.0.1]:53"));
        assert!(is_loop("0.0.0.0:53", "127.0.0.1:53"));
        assert!(!is_loop("10.100.0.1:53", "127.0.0.53:53"));
        assert!(!is_loop("10.100.0.1:18053", "10.100.0.1:53"));
    }

    #[test]
    fn an_address_of_no_single_host_is_refused() {
        for upstream in
            ["0.0.0.0:53", "255.255.255.255:53", "224.0.0.1:53", "[::]:53", "[ff02::1]:53", "192.0.2.1:0"]
        {
            let checked = check(&sockets(&[upstream]), &[]);
            assert!(matches!(checked, Err(UpstreamError::NotAHost(_))), "{upstream}");
        }
    }

    #[test]
    fn there_is_at_least_one_upstream_resolver_and_at_most_three() {
        assert!(matches!(check(&[], &[]), Err(UpstreamError::None)));
        let four = sockets(&["192.0.2.1:53", "192.0.2.2:53", "192.0.2.3:53", "192.0.2.4:53"]);
        assert!(matches!(check(&four, &[]), Err(UpstreamError::TooMany(4))));
        assert!(check(&four[..3], &[]).is_ok());
    }
}
