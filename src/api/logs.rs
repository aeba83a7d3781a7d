//! `GET /instances/{id}/logs`: the last lines, as server-sent events.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path as FilePath;

use axum::body::{Body, Bytes};
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};

use super::{ApiError, ApiState, lookup};

const TAIL_DEFAULT: usize = 100;
const TAIL_MAX: usize = 100_000;
/// How far back lines are looked for; a line longer than this is cut at its start.
const TAIL_BYTES_MAX: u64 = 4 << 20;

pub(super) async fn logs(
    State(state): State<ApiState>,
    id: Result<Path<String>, PathRejection>,
    params: Result<Query<BTreeMap<String, String>>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Query(params) = params?;
    let count = match params.get("tail") {
        None => TAIL_DEFAULT,
        Some(text) => text.parse().ok().filter(|count| (1..=TAIL_MAX).contains(count)).ok_or_else(|| {
            ApiError::bad_request(
                "invalid_request",
                format!("tail must be a whole number from 1 to {TAIL_MAX}"),
            )
        })?,
    };
    match params.get("follow").map(String::as_str) {
        None | Some("false") => {}
        Some("true") => return Err(ApiError::not_supported("following a log")),
        Some(_) => return Err(ApiError::bad_request("invalid_request", "follow must be true or false")),
    }
    let source = params.get("source").map_or("app", String::as_str);
    let object = lookup::instance(state.store(), &id?.0)?;
    let path = match source {
        "app" | "vmm" => state.0.backend.log(&object.meta.uid, source),
        "hypeman" | "stead" => return Err(ApiError::not_supported("the server's own log")),
        _ => {
            return Err(ApiError::bad_request(
                "invalid_request",
                "source must be app, vmm, stead or hypeman",
            ));
        }
    };
    let not_found =
        || ApiError::new(axum::http::StatusCode::NOT_FOUND, "log_not_found", "there is no such log yet");
    let path = path.ok_or_else(not_found)?;
    let lines =
        tokio::task::spawn_blocking(move || tail(&path, count)).await.map_err(|_| ApiError::internal())?;
    let lines = lines.map_err(|_| not_found())?;
    let events = lines.into_iter().map(|line| {
        let json = serde_json::Value::String(line);
        Ok::<Bytes, Infallible>(Bytes::from(format!("data: {json}\n\n")))
    });
    let headers = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-cache")];
    Ok((headers, [("x-accel-buffering", "no")], Body::from_stream(futures::stream::iter(events)))
        .into_response())
}

/// The last lines of a log and of the one it continues; what is not UTF-8 is shown as replacement
/// characters.
fn tail(path: &FilePath, count: usize) -> std::io::Result<Vec<String>> {
    let mut bytes = Vec::new();
    let older = path.with_extension("log.1");
    let present = [older.as_path(), path].into_iter().filter(|path| path.exists()).collect::<Vec<_>>();
    if present.is_empty() {
        return Err(std::io::ErrorKind::NotFound.into());
    }
    for path in present {
        read_end(path, &mut bytes)?;
    }
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    let first = lines.len().saturating_sub(count);
    Ok(lines[first..].iter().map(|line| line.trim_end_matches('\r').to_owned()).collect())
}

fn read_end(path: &FilePath, bytes: &mut Vec<u8>) -> std::io::Result<()> {
    let mut file = std::fs::File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES_MAX)))?;
    file.take(TAIL_BYTES_MAX).read_to_end(bytes)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_reach_over_a_rotation() {
        let dir = tempfile::tempdir().expect("scratch");
        let log = dir.path().join("app.log");
        assert!(tail(&log, 1).is_err());
        std::fs::write(dir.path().join("app.log.1"), "one\r\ntwo").expect("written");
        std::fs::write(&log, " goes on\nthree\n").expect("written");
        assert_eq!(tail(&log, 2).expect("read"), ["two goes on", "three"]);
        assert_eq!(tail(&log, 9).expect("read"), ["one", "two goes on", "three"]);
    }
}
