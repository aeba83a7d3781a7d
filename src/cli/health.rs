//! Health checks as flags of the command line, and health as a line for people.

use clap::{ArgGroup, Args};
use serde_json::{Value, json};
use stead_schemas::api::{HealthView, HealthWord};

use super::show::age;

/// The flags of a health check. At most one kind of check can be given; schedule and thresholds need one.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("health").args(["health_http", "health_https", "health_tcp", "health_exec"]))]
pub(crate) struct Health {
    /// PORT, or PORT/PATH: healthy while a GET is answered with 200 (or --health-status).
    #[arg(long, value_name = "PORT/PATH", value_parser = endpoint)]
    health_http: Option<Endpoint>,
    /// PORT, or PORT/PATH, over TLS; the server certificate is not verified.
    #[arg(long, value_name = "PORT/PATH", value_parser = endpoint)]
    health_https: Option<Endpoint>,
    /// A port; healthy while connections to it are accepted.
    #[arg(long, value_name = "PORT")]
    health_tcp: Option<u16>,
    /// A command line; healthy while it ends with 0 when /bin/sh runs it in the instance.
    #[arg(long, value_name = "LINE")]
    health_exec: Option<String>,
    /// The status that --health-http and --health-https expect.
    #[arg(long, value_name = "CODE", requires = "health")]
    health_status: Option<u16>,
    /// Time from one probe to the next, such as 10s.
    #[arg(long, value_name = "TIME", requires = "health")]
    health_interval: Option<String>,
    #[arg(long, value_name = "TIME", requires = "health")]
    health_timeout: Option<String>,
    /// Time after the start in which failures do not count.
    #[arg(long, value_name = "TIME", requires = "health")]
    health_start_period: Option<String>,
    /// Number of failures in a row that mean unhealthy.
    #[arg(long, value_name = "COUNT", requires = "health")]
    health_failures: Option<u32>,
    /// Number of successes in a row that mean healthy.
    #[arg(long, value_name = "COUNT", requires = "health")]
    health_successes: Option<u32>,
    /// Use no health check.
    #[arg(long, conflicts_with = "health")]
    no_health: bool,
}

#[derive(Debug, Clone)]
struct Endpoint {
    port: u16,
    path: String,
}

fn endpoint(text: &str) -> Result<Endpoint, String> {
    let (port, path) = text.split_at(text.find('/').unwrap_or(text.len()));
    let port = port.parse().map_err(|_| format!("{port:?} is no port"))?;
    Ok(Endpoint { port, path: if path.is_empty() { "/".to_owned() } else { path.to_owned() } })
}

impl Health {
    /// Adds the given flags to a request; the server validates the values.
    pub(super) fn put(&self, body: &mut Value) {
        if self.no_health {
            body["health_check"] = json!({ "type": "none" });
            return;
        }
        let http = |endpoint: &Endpoint, scheme: &str| json!({ "type": "http", "http": { "port": endpoint.port, "path": endpoint.path, "scheme": scheme } });
        let mut check = match (&self.health_http, &self.health_https, self.health_tcp, &self.health_exec) {
            (Some(endpoint), ..) => http(endpoint, "http"),
            (_, Some(endpoint), ..) => http(endpoint, "https"),
            (_, _, Some(port), _) => json!({ "type": "tcp", "tcp": { "port": port } }),
            (_, _, _, Some(line)) => {
                json!({ "type": "exec", "exec": { "command": ["/bin/sh", "-c", line] } })
            }
            (None, None, None, None) => return,
        };
        if let Some(status) = self.health_status {
            check["http"]["expected_status"] = status.into();
        }
        for (key, value) in [
            ("interval", &self.health_interval),
            ("timeout", &self.health_timeout),
            ("start_period", &self.health_start_period),
        ] {
            if let Some(value) = value {
                check[key] = value.as_str().into();
            }
        }
        for (key, value) in
            [("failure_threshold", self.health_failures), ("success_threshold", self.health_successes)]
        {
            if let Some(value) = value {
                check[key] = value.into();
            }
        }
        body["health_check"] = check;
    }
}

/// Describes the health of the program and the reason; returns `None` without a check.
pub(super) fn summary(health: &HealthView) -> Option<String> {
    let (word, count) = match health.status {
        HealthWord::Disabled => return None,
        HealthWord::Starting => ("starting", health.consecutive_failures),
        HealthWord::Healthy => ("healthy", health.consecutive_failures),
        HealthWord::Unhealthy => ("unhealthy", health.consecutive_failures),
        HealthWord::Unknown => ("unknown", 0),
    };
    let mut text = word.to_owned();
    if let Some(at) = health.last_checked_at {
        text.push_str(&format!(", checked {} ago", age(at)));
    }
    if count > 0 {
        let error = health.last_error.as_deref().unwrap_or_default();
        text.push_str(&format!("; {count} failures in a row: {error}"));
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        health: Health,
    }

    fn put(words: &[&str]) -> Result<Value, clap::Error> {
        let line = Line::try_parse_from([&["stead"], words].concat())?;
        let mut body = json!({});
        line.health.put(&mut body);
        Ok(body)
    }

    #[test]
    fn words_are_parsed_to_a_check() {
        let check = |words: &[&str]| put(words).expect("understood")["health_check"].clone();
        assert_eq!(put(&[]).expect("understood"), json!({}));
        assert_eq!(check(&["--no-health"]), json!({ "type": "none" }));
        let http = json!({ "type": "http", "http": { "port": 80, "path": "/", "scheme": "http" } });
        assert_eq!(check(&["--health-http", "80"]), http);
        let words = [
            "--health-https",
            "8443/a?b=c/d",
            "--health-interval",
            "5s",
            "--health-failures",
            "2",
            "--health-status",
            "204",
        ];
        let https = json!({ "type": "http", "interval": "5s", "failure_threshold": 2,
            "http": { "port": 8443, "path": "/a?b=c/d", "scheme": "https", "expected_status": 204 } });
        assert_eq!(check(&words), https);
        let exec = json!({ "type": "exec", "exec": { "command": ["/bin/sh", "-c", "test -e /ok"] } });
        assert_eq!(check(&["--health-exec", "test -e /ok"]), exec);
    }

    #[test]
    fn words_that_contradict_each_other_are_refused() {
        for words in [
            &["--health-tcp", "1", "--health-http", "2"][..],
            &["--no-health", "--health-tcp", "1"],
            &["--health-interval", "5s"],
            &["--health-http", "x/y"],
            &["--health-tcp", "65536"],
        ] {
            assert!(put(words).is_err(), "{words:?}");
        }
    }
}
