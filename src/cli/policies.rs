//! Policies and limits of an instance as flags of the command line, for `run` and `update`.

use clap::Args;
use serde_json::{Value, json};

use super::health::Health;
use super::{Failure, auto_standby};

#[derive(Debug, Args)]
pub(crate) struct Policies {
    /// Restart policy: never, always, or on_failure; a number after a colon bounds the attempts:
    /// on_failure:3.
    #[arg(long)]
    restart: Option<String>,
    /// Delay before the first restart, such as 5s; each further restart waits twice as long.
    #[arg(long, requires = "restart")]
    restart_backoff: Option<String>,
    /// Time after which the instance is deleted, such as 2h; 0s for never.
    #[arg(long, conflicts_with = "expires_at")]
    ttl: Option<String>,
    /// Time at which the instance is deleted, such as 2027-01-01T00:00:00Z.
    #[arg(long)]
    expires_at: Option<String>,
    /// Limit of the bytes read and written on all disks together, such as 100MB/s; 0 for none.
    #[arg(long)]
    disk_io: Option<String>,
    #[command(flatten)]
    health: Health,
    #[command(flatten)]
    auto_standby: auto_standby::Policy,
}

impl Policies {
    /// Adds the given flags to a request; the server validates the values.
    pub(super) fn put(&self, body: &mut Value) -> Result<(), Failure> {
        if let Some(restart) = &self.restart {
            let (policy, attempts) = match restart.split_once(':') {
                Some((policy, attempts)) => (policy, Some(attempts)),
                None => (restart.as_str(), None),
            };
            let mut object = json!({ "policy": policy });
            if let Some(attempts) = attempts {
                let attempts: u32 = attempts.parse().map_err(|_| {
                    Failure::Usage(format!("--restart: {attempts:?} is no number of attempts"))
                })?;
                object["max_attempts"] = attempts.into();
            }
            if let Some(backoff) = &self.restart_backoff {
                object["backoff"] = backoff.as_str().into();
            }
            body["restart_policy"] = object;
        }
        self.auto_standby.put(body);
        let texts = [("ttl", &self.ttl), ("expires_at", &self.expires_at), ("disk_io_bps", &self.disk_io)];
        for (key, value) in texts {
            if let Some(value) = value {
                body[key] = value.as_str().into();
            }
        }
        self.health.put(body);
        Ok(())
    }
}
