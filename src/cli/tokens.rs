//! Verbs on the tokens of this host's own daemon, which notices every change within a second or two.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use stead_schemas::quantity::GoDuration;

use super::show::{age, line, print};
use super::{Failure, Output};
use crate::api::auth::Grant;
use crate::api::tokens::{self, TokenRecord};
use crate::store::{new_token_id, remove_old_token_key, rotate_token_key};

#[derive(Debug, Subcommand)]
pub(crate) enum Token {
    /// Print a new token.
    Create(Create),
    /// List tokens that were made here and have not expired.
    List {
        #[command(flatten)]
        data: DataLocation,
    },
    /// Revoke tokens; requests in progress with them end.
    Revoke {
        /// Ids, as shown by the list.
        #[arg(required = true)]
        ids: Vec<String>,
        #[command(flatten)]
        data: DataLocation,
    },
    /// Sign with a new key. Tokens of the previous key stay valid until that key is removed.
    RotateKey {
        #[command(flatten)]
        data: DataLocation,
    },
    /// Remove the key before the last rotation, and with it all tokens that it signed.
    RemoveOldKey {
        #[command(flatten)]
        data: DataLocation,
    },
}

#[derive(Debug, Args)]
pub(crate) struct DataLocation {
    /// The daemon's data directory.
    #[arg(long, default_value = "/var/lib/stead", env = "STEAD_DATA_DIR")]
    data_dir: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Create {
    #[command(flatten)]
    data: DataLocation,
    /// Scopes joined by commas, such as `instance:read,image:read`, or `*` for all.
    #[arg(long, default_value = "*", value_delimiter = ',')]
    scopes: Vec<String>,
    /// Time to live as a Go duration, such as `1h`.
    #[arg(long, default_value = "1h")]
    ttl: String,
    /// Subject of the token, as shown in the audit log.
    #[arg(long, default_value = "admin")]
    subject: String,
}

impl DataLocation {
    /// Returns the directory if it exists: a key in a directory without a daemon would sign useless tokens.
    fn directory(&self) -> Result<&Path, Failure> {
        if self.data_dir.is_dir() {
            return Ok(&self.data_dir);
        }
        Err(Failure::Usage(format!("there is no stead data directory at {}", self.data_dir.display())))
    }
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> Failure {
    Failure::from(anyhow::Error::from(error))
}

pub(super) fn token(verb: Token, output: Output) -> Result<(), Failure> {
    match verb {
        Token::Create(create) => self::create(&create),
        Token::List { data } => {
            let records = tokens::records(data.directory()?).map_err(failed)?;
            print(&records, output, &["ID", "SUBJECT", "SCOPES", "AGE", "EXPIRES", "STATE"], || {
                records.iter().map(row).collect()
            })
        }
        Token::Revoke { ids, data } => revoke(data.directory()?, &ids),
        Token::RotateKey { data } => rotate_token_key(data.directory()?).map_err(failed),
        Token::RemoveOldKey { data } => remove_old_token_key(data.directory()?).map_err(failed),
    }
}

fn row(record: &TokenRecord) -> Vec<String> {
    let state = match (record.revoked_at, record.expires_at <= jiff::Timestamp::now()) {
        (Some(_), _) => "revoked",
        (None, true) => "expired",
        (None, false) => "good",
    };
    vec![
        record.id.clone(),
        record.subject.clone(),
        record.scopes.join(","),
        age(record.created_at),
        record.expires_at.to_string(),
        state.to_owned(),
    ]
}

fn create(create: &Create) -> Result<(), Failure> {
    let Create { data, scopes, ttl, subject } = create;
    let directory = data.directory()?;
    let GoDuration(ttl) = ttl.parse().map_err(|error| Failure::Usage(format!("--ttl {error}")))?;
    let now = jiff::Timestamp::now();
    let ends = jiff::SignedDuration::try_from(ttl).ok().and_then(|ttl| now.checked_add(ttl).ok());
    let ends = ends.ok_or_else(|| Failure::Usage("--ttl is too long".to_owned()))?;
    let keys = tokens::load(directory).map_err(failed)?;
    let id = new_token_id();
    let grant = Grant { subject, id: &id, scopes, issued_at: now, expires_at: ends };
    let token = keys.mint(&grant).map_err(Failure::Usage)?;
    let record = TokenRecord {
        id: id.clone(),
        subject: subject.clone(),
        scopes: scopes.clone(),
        created_at: now,
        expires_at: ends,
        revoked_at: None,
    };
    // The token is recorded before it is used: otherwise it could not be revoked.
    tokens::change(directory, |all| all.push(record)).map_err(failed)?;
    line(&token);
    Ok(())
}

fn revoke(directory: &Path, ids: &[String]) -> Result<(), Failure> {
    let now = jiff::Timestamp::now();
    let absent = tokens::change(directory, |all| {
        let is_absent = |id: &&String| match all.iter_mut().find(|record| record.id == **id) {
            Some(record) => {
                record.revoked_at.get_or_insert(now);
                false
            }
            None => true,
        };
        ids.iter().filter(is_absent).cloned().collect::<Vec<_>>()
    });
    match absent.map_err(failed)?.as_slice() {
        [] => Ok(()),
        absent => Err(Failure::NotFound(format!("there is no token {}", absent.join(", ")))),
    }
}
