//! Routes with their rules: a route cannot be added by mistake without the scopes that it needs.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{MatchedPath, Query, Request, State};
use axum::handler::Handler;
use axum::http::{StatusCode, Uri};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, on};
use axum::{Extension, Router};
use bytes::Bytes;
use futures::StreamExt;
use stead_schemas::limits::{BODY_BYTES_MAX, BODY_RATE_MIN, BODY_WAIT_MAX};
use zeroize::Zeroizing;

use super::audit::{Entry, Record};
use super::auth::Bearer;
use super::client::Client;
use super::openapi::Document;
use super::operation::Operation;
use super::pools::Pool;
use super::rule::{Rule, Verb};
use super::{ApiError, ApiState, error};
use crate::peers::{Patience, Patient};

/// The query parameter that allows all parameters that name a tag.
const TAGS: &str = "tags";

/// A route, as it appears in the table.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct RouteView {
    pub method: &'static str,
    pub path: &'static str,
    /// The name of the operation in the OpenAPI document.
    pub operation_id: &'static str,
    /// The scopes that it needs, all of them; empty for a public route.
    pub scopes: Vec<&'static str>,
}

/// A router under construction.
pub(super) struct Routes {
    state: ApiState,
    paths: BTreeMap<&'static str, MethodRouter<ApiState>>,
    operations: Vec<Operation>,
}

impl Routes {
    pub(super) fn new(state: ApiState) -> Self {
        Self { state, paths: BTreeMap::new(), operations: Vec::new() }
    }

    /// Adds a route. A public one is answered at once whatever the load; requests for others are checked by
    /// their rule first.
    pub(super) fn add<H, T>(mut self, operation: Operation, handler: H) -> Self
    where
        H: Handler<T, ApiState>,
        T: 'static,
    {
        let mut methods = on(operation.verb.filter(), handler);
        if let Some(rule) = operation.rule {
            let is_audited = rule.is_audited || !matches!(operation.verb, Verb::Get);
            let check =
                Check { rule: Rule { is_audited, ..rule }, query: operation.query_names().map(Arc::from) };
            if rule.has_streamed_body {
                methods = methods.layer(axum::extract::DefaultBodyLimit::disable());
            }
            methods = methods.route_layer(middleware::from_fn_with_state((self.state.clone(), check), guard));
        }
        self.merge(operation.path, methods);
        self.operations.push(operation);
        self
    }

    fn merge(&mut self, path: &'static str, methods: MethodRouter<ApiState>) {
        let known = self.paths.remove(path).unwrap_or_default();
        self.paths.insert(path, known.merge(methods));
    }

    /// Returns all routes that were added.
    pub(super) fn views(self) -> Vec<RouteView> {
        let scopes = |rule: &Rule| rule.scopes.iter().map(|scope| scope.as_str()).collect();
        let view = |operation: &Operation| RouteView {
            method: operation.verb.name(),
            path: operation.path,
            operation_id: operation.id,
            scopes: operation.rule.as_ref().map(scopes).unwrap_or_default(),
        };
        self.operations.iter().map(view).collect()
    }

    pub(super) fn finish(self) -> Router {
        let mut router = Router::new();
        for (path, methods) in self.paths {
            router = router.route(path, methods.fallback(wrong_method));
        }
        let document = Arc::new(Document::of(self.operations));
        router.fallback(unknown_path).with_state(self.state).layer(Extension(document))
    }
}

/// The checks of requests for a route.
#[derive(Debug, Clone)]
struct Check {
    rule: Rule,
    /// The query parameters that the route reads; `None` for a route that is not served yet, which reads
    /// none and refuses none.
    query: Option<Arc<[String]>>,
}

/// Runs before every handler except the public ones; admitted and refused requests are recorded when the
/// rule is audited.
async fn guard(State((state, check)): State<(ApiState, Check)>, request: Request, next: Next) -> Response {
    if !check.rule.is_audited {
        return admit(&state, &check, request, next, None).await.into_response();
    }
    let client = request.extensions().get::<Client>().cloned();
    let route = request.extensions().get::<MatchedPath>().map_or("", MatchedPath::as_str);
    // The query is included, because it may name what is created.
    let object = request.uri().path_and_query().map_or("", |object| object.as_str());
    let entry = Entry::new(client.as_ref(), request.method().as_str(), route, object);
    // The record is written even when the client leaves before its response: the request may be carried out.
    let mut record = Record::new(&state.0.audit, entry);
    let answer = admit(&state, &check, request, next, Some(&mut record)).await.into_response();
    record.end(answer.status());
    answer
}

/// Checks the scopes, then the query, then reads the whole body, and only then takes a permit of the pool: a
/// client that sends slowly takes no permit from those that have sent.
async fn admit(
    state: &ApiState,
    Check { rule, query }: &Check,
    request: Request,
    next: Next,
    mut record: Option<&mut Record<'_>>,
) -> Result<Response, ApiError> {
    let mut bearer = state.0.keys.authenticate(request.headers(), request.extensions().get::<Client>())?;
    if let Some(record) = &mut record {
        record.entry.by(&bearer);
    }
    if state.0.requires_permissions {
        bearer.names_permissions()?;
    }
    rule.scopes.iter().try_for_each(|&scope| bearer.needs(scope))?;
    if state.0.shows_secrets {
        bearer.let_see_secrets();
    }
    check_query(request.uri(), query.as_deref())?;
    let (mut parts, body) = request.into_parts();
    parts.extensions.insert(bearer.clone());
    let body = match rule.has_streamed_body {
        true => Body::new(Patient::new(body, Patience::at_rate(BODY_WAIT_MAX, BODY_RATE_MIN))),
        false => {
            let bytes = whole(state, &bearer, body).await?;
            if let Some(record) = &mut record {
                record.entry.of(&bytes);
            }
            Body::from(bytes)
        }
    };
    let _permit = state.0.pools.take(rule.pool, &bearer.subject)?;
    if let Some(record) = record {
        record.is_admitted = true;
    }
    let answer = next.run(Request::from_parts(parts, body));
    if rule.pool == Pool::Waits {
        return tokio::select! {
            biased;
            answer = answer => Ok(answer),
            () = bearer.ends() => {
                Err(ApiError::refused(StatusCode::UNAUTHORIZED, "the token ended while its request waited"))
            }
        };
    }
    let answer = answer.await;
    if !rule.goes_on || axum::body::HttpBody::size_hint(answer.body()).exact().is_some() {
        return Ok(answer);
    }
    let permit = state.0.pools.take(Pool::Streams, &bearer.subject)?;
    let ends = Box::pin(bearer.ends());
    Ok(answer.map(|body| {
        let pieces = body.into_data_stream().take_until(ends);
        // The permit is held as long as the stream flows.
        Body::from_stream(pieces.inspect(move |_| _ = &permit))
    }))
}

/// Reads a whole body within its time limit.
async fn whole(state: &ApiState, bearer: &Bearer, body: Body) -> Result<Bytes, ApiError> {
    if axum::body::HttpBody::is_end_stream(&body) {
        return Ok(Bytes::new());
    }
    let _permit = state.0.pools.take(Pool::Bodies, &bearer.subject)?;
    let body = Body::new(Patient::new(body, Patience::in_all(BODY_WAIT_MAX)));
    // A body may contain a secret: its memory is cleared, and since the whole capacity is reserved at the
    // start, no copies stay behind.
    let length = axum::body::HttpBody::size_hint(&body).lower();
    let room = usize::try_from(length).unwrap_or(BODY_BYTES_MAX).min(BODY_BYTES_MAX);
    let mut bytes = Zeroizing::new(Vec::with_capacity(room));
    let mut pieces = body.into_data_stream();
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(|error| error::of_body(&error))?;
        if bytes.len().saturating_add(piece.len()) > BODY_BYTES_MAX {
            return Err(error::too_large());
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(Bytes::from_owner(bytes))
}

/// Refuses parameters that the route does not read: they would be ignored silently.
fn check_query(uri: &Uri, allowed: Option<&[String]>) -> Result<(), ApiError> {
    let Some(allowed) = allowed else { return Ok(()) };
    let Query(params) = Query::<Vec<(String, String)>>::try_from_uri(uri)?;
    let is_known = |name: &str| {
        let name = if name.starts_with("tags") { TAGS } else { name };
        allowed.iter().any(|known| known == name)
    };
    let mut names = BTreeSet::new();
    if let Some((twice, _)) = params.iter().find(|(name, _)| !names.insert(name)) {
        // Only one of the two would be read.
        return Err(ApiError::bad_request("invalid_request", format!("{twice:?} is there twice")));
    }
    match params.iter().find(|(name, _)| !is_known(name)) {
        None => Ok(()),
        Some((name, _)) => {
            let message = format!("{name:?} is not a parameter of this request");
            Err(ApiError::bad_request("invalid_request", message))
        }
    }
}

async fn wrong_method() -> ApiError {
    ApiError::refused(StatusCode::METHOD_NOT_ALLOWED, "this path does not take this method")
}

async fn unknown_path(uri: Uri) -> ApiError {
    ApiError::refused(StatusCode::NOT_FOUND, format!("there is no {}", uri.path()))
}
