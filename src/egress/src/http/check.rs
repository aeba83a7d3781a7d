//! Checks of the head of a request.
//!
//! Guarantees: a request that passes names exactly one host in every form that servers read, and it is the
//! host of its connection.

use hyper::header::HOST;
use hyper::http::uri::PathAndQuery;
use hyper::{Method, Request, Version};
use stead_schemas::egress::{Authority, Host, Reason};

use super::fields;

/// The port of a URI of plain HTTP that names none.
const HTTP_PORT: u16 = 80;

/// The destination that the requests of a connection may have.
#[derive(Debug, Clone)]
pub(crate) enum Expected {
    /// The host of the connection, which the client chose by TLS or CONNECT.
    Connection(Authority),
    /// Any host that the request names, at the port that the guest connected to.
    AnyHost { port: u16 },
    /// The host of an absolute URI, as proxies get it.
    Absolute,
}

/// A request's destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Checked {
    pub(super) authority: Authority,
    /// The value of `Host` or `:authority` for the server, in normal form.
    pub(super) host_field: String,
    pub(super) path: PathAndQuery,
}

/// Checks the head of a request.
///
/// # Errors
/// Returns the reason for a refusal.
pub(super) fn check<T>(request: &Request<T>, expected: &Expected) -> Result<Checked, Reason> {
    if *request.method() == Method::CONNECT || is_trace(request.method()) {
        return Err(Reason::MethodNotAllowed);
    }
    if fields::asks_for_http2(request.headers()) {
        return Err(Reason::UpgradeNotAllowed);
    }
    let (authority, has_port) = authority(request, expected)?;
    match expected {
        Expected::Connection(connection) if authority != *connection => return Err(Reason::Misdirected),
        Expected::AnyHost { port } if authority.port != *port => return Err(Reason::Misdirected),
        Expected::Connection(_) | Expected::AnyHost { .. } | Expected::Absolute => {}
    }
    let host_field = host_field(&authority, has_port);
    Ok(Checked { authority, host_field, path: path(request)? })
}

/// Returns `true` for methods that make a server repeat the head of a request, credentials included.
fn is_trace(method: &Method) -> bool {
    *method == Method::TRACE
        || method.as_str().eq_ignore_ascii_case("TRACE")
        || method.as_str().eq_ignore_ascii_case("TRACK")
}

/// Returns the authority that the request names, and whether it names the port.
fn authority<T>(request: &Request<T>, expected: &Expected) -> Result<(Authority, bool), Reason> {
    let port = match expected {
        Expected::Connection(connection) => connection.port,
        Expected::AnyHost { port } => *port,
        Expected::Absolute => HTTP_PORT,
    };
    let read = |text: &str| {
        let authority = Authority::of_host(text, port).map_err(|_| Reason::BadHost)?;
        // The text ends with the port unless it is only a host.
        Ok((authority, text.parse::<Host>().is_err()))
    };
    let mut hosts = request.headers().get_all(HOST).iter();
    let field = match (hosts.next(), hosts.next()) {
        (Some(host), None) => Some(read(host.to_str().map_err(|_| Reason::BadHost)?)?),
        (None, None) => None,
        _ => return Err(Reason::BadHost),
    };
    let target = match request.uri().authority() {
        Some(named) if has_scheme(request, expected) => Some(read(named.as_str())?),
        Some(_) => return Err(Reason::BadRequest),
        None => None,
    };
    match (target, field) {
        (Some((target, _)), Some((field, _))) if target != field => Err(Reason::Misdirected),
        (Some(target), Some(_)) => Ok(target),
        // HTTP/2 names the host in `:authority` alone; HTTP/1 always has the field.
        (Some(target), None) if request.version() == Version::HTTP_2 => Ok(target),
        (None, Some(field)) if !matches!(expected, Expected::Absolute) => Ok(field),
        (None, Some(_)) => Err(Reason::BadRequest),
        (Some(_) | None, None) => Err(Reason::BadHost),
    }
}

/// Returns `true` if the scheme of an absolute URI fits the connection.
fn has_scheme<T>(request: &Request<T>, expected: &Expected) -> bool {
    match (request.uri().scheme_str(), expected) {
        (Some("http"), _) | (Some("https"), Expected::Connection(_)) => true,
        (Some(_), _) => false,
        // Only the target of CONNECT has no scheme.
        (None, _) => false,
    }
}

fn host_field(authority: &Authority, has_port: bool) -> String {
    if has_port { authority.to_string() } else { authority.host.to_string() }
}

/// Returns the path and the query. A path that begins with two slashes is refused: programs read it as a host.
fn path<T>(request: &Request<T>) -> Result<PathAndQuery, Reason> {
    let path = match request.uri().path_and_query() {
        None => PathAndQuery::from_static("/"),
        Some(path) if path.as_str() == "*" && *request.method() == Method::OPTIONS => path.clone(),
        Some(path) if path.as_str().starts_with('/') => path.clone(),
        // An absolute URI may have a query and no path.
        Some(path) if path.as_str().starts_with('?') => {
            format!("/{}", path.as_str()).parse().map_err(|_| Reason::BadRequest)?
        }
        Some(_) => return Err(Reason::BadRequest),
    };
    if path.as_str().starts_with("//") { Err(Reason::BadRequest) } else { Ok(path) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn request(method: &str, uri: &str, fields: &[(&str, &str)]) -> Request<()> {
        let mut builder = Request::builder().method(method).uri(uri);
        for (name, value) in fields {
            builder = builder.header(*name, *value);
        }
        builder.body(()).expect("a request")
    }

    fn connection(text: &str) -> Expected {
        Expected::Connection(Authority::of_connect(text).expect("an authority"))
    }

    fn outcome(request: &Request<()>, expected: &Expected) -> Result<String, Reason> {
        check(request, expected)
            .map(|checked| format!("{} {} {}", checked.authority, checked.host_field, checked.path))
    }

    #[test]
    fn a_request_over_a_connection_names_its_host() {
        let api = connection("api.example.com:443");
        for (uri, host, expected) in [
            ("/v1?q", "api.example.com", Ok("api.example.com:443 api.example.com /v1?q")),
            ("/", "API.example.com.", Ok("api.example.com:443 api.example.com /")),
            ("/", "api.example.com:443", Ok("api.example.com:443 api.example.com:443 /")),
            ("https://api.example.com/x", "api.example.com", Ok("api.example.com:443 api.example.com /x")),
            ("https://api.example.com?q", "api.example.com", Ok("api.example.com:443 api.example.com /?q")),
            ("/", "api.example.com:444", Err(Reason::Misdirected)),
            ("/", "evil.example.com", Err(Reason::Misdirected)),
            ("/", "www.example.com", Err(Reason::Misdirected)),
            ("https://other.example/", "api.example.com", Err(Reason::Misdirected)),
            ("https://other.example/", "other.example", Err(Reason::Misdirected)),
            ("https://user@api.example.com/", "api.example.com", Err(Reason::BadHost)),
            ("ftp://api.example.com/", "api.example.com", Err(Reason::BadRequest)),
            ("/", "user@api.example.com", Err(Reason::BadHost)),
            ("/", "api.example.com:", Err(Reason::BadHost)),
            ("/", "api.example.com:0", Err(Reason::BadHost)),
            ("/", "api.example.com, other.example", Err(Reason::BadHost)),
            ("/", "", Err(Reason::BadHost)),
            ("//other.example/", "api.example.com", Err(Reason::BadRequest)),
        ] {
            let found = outcome(&request("GET", uri, &[("host", host)]), &api);
            assert_eq!(found, expected.map(str::to_owned), "{uri} {host}");
        }
    }

    #[test]
    fn a_request_has_exactly_one_host() {
        let api = connection("api.example.com:443");
        let twice = request("GET", "/", &[("host", "api.example.com"), ("host", "api.example.com")]);
        assert_eq!(outcome(&twice, &api), Err(Reason::BadHost));
        assert_eq!(outcome(&request("GET", "/", &[]), &api), Err(Reason::BadHost));
        let mut second = request("GET", "https://api.example.com/", &[]);
        assert_eq!(outcome(&second, &api), Err(Reason::BadHost));
        *second.version_mut() = Version::HTTP_2;
        assert!(outcome(&second, &api).is_ok());
        second.headers_mut().insert(HOST, hyper::header::HeaderValue::from_static("other.example"));
        assert_eq!(outcome(&second, &api), Err(Reason::Misdirected));
    }

    #[test]
    fn methods_that_repeat_a_head_or_open_a_tunnel_are_refused() {
        let api = connection("api.example.com:443");
        for method in ["TRACE", "TRACK", "trace", "CONNECT"] {
            let uri = if method == "CONNECT" { "other.example:443" } else { "/" };
            let found = outcome(&request(method, uri, &[("host", "api.example.com")]), &api);
            assert_eq!(found, Err(Reason::MethodNotAllowed), "{method}");
        }
        let options = request("OPTIONS", "*", &[("host", "api.example.com")]);
        assert!(outcome(&options, &api).is_ok());
        let upgrade = [("host", "api.example.com"), ("upgrade", "h2c"), ("connection", "upgrade")];
        assert_eq!(outcome(&request("GET", "/", &upgrade), &api), Err(Reason::UpgradeNotAllowed));
    }

    #[test]
    fn a_proxy_gets_absolute_uris_of_plain_http() {
        let ask =
            |uri: &str, host: &str| outcome(&request("GET", uri, &[("host", host)]), &Expected::Absolute);
        assert_eq!(ask("http://a.example/x", "a.example"), Ok("a.example:80 a.example /x".to_owned()));
        assert_eq!(ask("http://a.example:81/", "a.example:81"), Ok("a.example:81 a.example:81 /".to_owned()));
        assert_eq!(ask("http://a.example/", "b.example"), Err(Reason::Misdirected));
        assert_eq!(ask("http://a.example:81/", "a.example"), Err(Reason::Misdirected));
        assert_eq!(ask("https://a.example/", "a.example"), Err(Reason::BadRequest));
        assert_eq!(ask("/", "a.example"), Err(Reason::BadRequest));
        assert_eq!(ask("http://u:p@a.example/", "a.example"), Err(Reason::BadHost));
        assert_eq!(ask("http://2130706433/", "2130706433"), Err(Reason::BadHost));
    }

    proptest! {
        #[test]
        fn a_request_passes_only_with_the_host_of_its_connection(
            uri in "(https?://)?[ab.@:]{0,6}/?[ab/?]{0,3}",
            hosts in proptest::collection::vec("[abAB.:@ 4]{0,6}", 0..3),
            is_http2: bool,
        ) {
            let mut builder = Request::builder().uri(uri);
            for host in &hosts {
                builder = builder.header("host", host);
            }
            let Ok(mut request) = builder.body(()) else { return Ok(()) };
            if is_http2 {
                *request.version_mut() = Version::HTTP_2;
            }
            let connection = Authority::of_connect("a.b:443").expect("an authority");
            if let Ok(checked) = check(&request, &Expected::Connection(connection.clone())) {
                prop_assert_eq!(&checked.authority, &connection);
                prop_assert!(hosts.len() <= 1 && !checked.path.as_str().starts_with("//"));
                for named in hosts.iter().map(String::as_str).chain(request.uri().authority().map(|one| one.as_str())) {
                    prop_assert_eq!(Authority::of_host(named, 443), Ok(connection.clone()));
                }
            }
        }
    }

    #[test]
    fn a_captured_request_names_the_port_that_was_connected_to() {
        let ask =
            |host: &str| outcome(&request("GET", "/", &[("host", host)]), &Expected::AnyHost { port: 80 });
        assert_eq!(ask("a.example"), Ok("a.example:80 a.example /".to_owned()));
        assert_eq!(ask("a.example:80"), Ok("a.example:80 a.example:80 /".to_owned()));
        assert_eq!(ask("a.example:8080"), Err(Reason::Misdirected));
    }
}
