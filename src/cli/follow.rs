//! `stead logs`: lines of a log, continued after a lost connection.
//!
//! The wire has no position to continue from: after a lost connection the last lines are requested again,
//! and those that were printed already are left out. A log that consists only of equal lines may lose some
//! in this way.

use std::collections::VecDeque;
use std::time::Duration;

use futures::StreamExt;
use reqwest::Method;
use stead_schemas::api::Instance;
use tokio::time::{sleep, timeout};

use super::Failure;
use super::client::Client;
use super::instances::Logs;
use super::show::{is_for_people, line, shown};

/// Number of printed lines that are kept to find the position again: as many as a busy program writes in the
/// second of a restart.
const KEPT: usize = 1000;
/// Time for which a server that restarts may be away.
const AWAY_MAX: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(500);
/// Time without a line after which the lines that exist already have all arrived: they come at once.
const QUIET: Duration = Duration::from_secs(2);

/// Largest size of a line in transit, in bytes: the longest line of a log, with each of its bytes written as
/// an escape.
const LINE_BYTES_MAX: usize = 64 << 20;

/// Lines of a log, as they come over one connection.
pub(super) struct Lines {
    chunks: futures::stream::BoxStream<'static, reqwest::Result<bytes::Bytes>>,
    rest: Vec<u8>,
    ready: VecDeque<String>,
}

impl Lines {
    pub(super) async fn open(client: &Client, logs: &Logs, tail: usize) -> Result<Self, Failure> {
        let follow = if logs.follow { "true" } else { "false" };
        let query = [("tail", &*tail.to_string()), ("source", &logs.source), ("follow", follow)];
        let request = client.request(Method::GET, &["instances", &logs.name, "logs"]).query(&query);
        let chunks = client.stream(request).await?.bytes_stream().boxed();
        Ok(Self { chunks, rest: Vec::new(), ready: VecDeque::new() })
    }

    /// Returns the next line; `None` at the end.
    pub(super) async fn next(&mut self) -> Result<Option<String>, Failure> {
        while self.ready.is_empty() {
            let Some(chunk) = self.chunks.next().await else { return Ok(None) };
            self.rest.extend_from_slice(&chunk.map_err(|error| Failure::Lost(error.to_string()))?);
            if self.rest.len() > LINE_BYTES_MAX {
                return Err(Failure::Other("the server sends a line that no log has".to_owned()));
            }
            let Some(end) = self.rest.iter().rposition(|&byte| byte == b'\n') else { continue };
            let whole: Vec<u8> = self.rest.drain(..=end).collect();
            let events = whole.split(|&byte| byte == b'\n').filter_map(|event| event.strip_prefix(b"data: "));
            self.ready.extend(events.map(|json| serde_json::from_slice(json).unwrap_or_default()));
        }
        Ok(self.ready.pop_front())
    }
}

/// The last lines that were printed.
#[derive(Default)]
struct Printed(VecDeque<String>);

impl Printed {
    fn print(&mut self, text: String, form: &impl Fn(String) -> String, raw: bool) {
        let formed = form(text.clone());
        if raw || !is_for_people() {
            line(&formed)
        } else {
            line(&shown(&formed))
        }
        if self.0.len() == KEPT {
            self.0.pop_front();
        }
        self.0.push_back(text);
    }

    /// Returns how many of these lines, the last of the log, were printed already.
    fn overlap(&self, lines: &[String]) -> usize {
        let most = lines.len().min(self.0.len());
        let is_end = |&count: &usize| self.0.iter().skip(self.0.len() - count).eq(&lines[..count]);
        (0..=most).rev().find(is_end).unwrap_or(0)
    }
}

/// Prints the lines of a log, each in the form that `form` gives it.
pub(super) async fn logs(
    client: &Client,
    mut logs: Logs,
    form: impl Fn(String) -> String,
) -> Result<(), Failure> {
    if logs.follow {
        // By id: the instance may get another name in the meantime.
        let instance: Instance = client.get(&["instances", &logs.name]).await?;
        logs.name = instance.id;
    }
    let mut printed = Printed::default();
    let first = usize::try_from(logs.tail).unwrap_or(usize::MAX);
    let mut lines = Lines::open(client, &logs, first).await?;
    loop {
        match lines.next().await {
            Ok(Some(text)) => printed.print(text, &form, logs.raw),
            Ok(None) if !logs.follow => return Ok(()),
            // The instance or the server is gone; the server's next response decides which.
            Ok(None) | Err(Failure::Lost(_)) if logs.follow => {
                lines = match again(client, &logs, &form, &mut printed, first).await {
                    // The instance was deleted meanwhile, so the log ends.
                    Err(Failure::NotFound(_)) => return Ok(()),
                    again => again?,
                };
            }
            Ok(None) => return Ok(()),
            Err(failure) => return Err(failure),
        }
    }
}

/// Connects again, and prints the lines that were not printed yet.
async fn again(
    client: &Client,
    logs: &Logs,
    form: &impl Fn(String) -> String,
    printed: &mut Printed,
    first: usize,
) -> Result<Lines, Failure> {
    eprintln!("stead: the connection was lost; trying again");
    sleep(PAUSE).await;
    let tail = if printed.0.is_empty() { first } else { printed.0.len() };
    let mut lines =
        client.until_there(AWAY_MAX, PAUSE, async || Lines::open(client, logs, tail).await).await?;
    let mut last = Vec::new();
    while last.len() < tail {
        match timeout(QUIET, lines.next()).await {
            Ok(Ok(Some(text))) => last.push(text),
            Ok(Ok(None)) | Err(_) => break,
            // The connection was lost again: the lines that are not printed yet are requested again.
            Ok(Err(Failure::Lost(_))) => {
                sleep(PAUSE).await;
                return Box::pin(again(client, logs, form, printed, first)).await;
            }
            Ok(Err(failure)) => return Err(failure),
        }
    }
    let known = printed.overlap(&last);
    if known == 0 && !printed.0.is_empty() && !last.is_empty() {
        eprintln!("stead: lines are missing here");
    }
    last.into_iter().skip(known).for_each(|text| printed.print(text, form, logs.raw));
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(words: &str) -> Vec<String> {
        words.split(' ').filter(|word| !word.is_empty()).map(ToOwned::to_owned).collect()
    }

    #[test]
    fn what_was_printed_is_found_again_at_the_start_of_the_last_lines() {
        for (printed, last, known) in [
            ("a b c", "a b c", 3),
            ("a b c", "b c d", 2),
            ("a b c", "c d e", 1),
            ("a b c", "d e f", 0),
            ("a b a", "b a b", 2),
            ("a", "", 0),
            ("", "a b", 0),
        ] {
            let seen = Printed(lines(printed).into()).overlap(&lines(last));
            assert_eq!(seen, known, "{printed} / {last}");
        }
    }
}
