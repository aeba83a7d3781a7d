//! Routes with their scopes: a route without a scope cannot be added by mistake.

use std::collections::BTreeMap;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{StatusCode, Uri};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::MethodRouter;

use super::auth::Scope;
use super::{ApiError, ApiState};

/// A router under construction.
pub(super) struct Routes {
    state: ApiState,
    paths: BTreeMap<&'static str, MethodRouter<ApiState>>,
}

impl Routes {
    pub(super) fn new(state: ApiState) -> Self {
        Self { state, paths: BTreeMap::new() }
    }

    /// A route for everyone.
    pub(super) fn public(mut self, path: &'static str, methods: MethodRouter<ApiState>) -> Self {
        self.merge(path, methods);
        self
    }

    /// A route for bearers of a token with the scope.
    pub(super) fn add(mut self, path: &'static str, scope: Scope, methods: MethodRouter<ApiState>) -> Self {
        let guard = middleware::from_fn_with_state((self.state.clone(), scope), authorize);
        self.merge(path, methods.route_layer(guard));
        self
    }

    /// Likewise, for bodies that are streamed and bounded by their handler.
    pub(super) fn add_unlimited(
        self,
        path: &'static str,
        scope: Scope,
        methods: MethodRouter<ApiState>,
    ) -> Self {
        self.add(path, scope, methods.layer(axum::extract::DefaultBodyLimit::disable()))
    }

    fn merge(&mut self, path: &'static str, methods: MethodRouter<ApiState>) {
        let known = self.paths.remove(path).unwrap_or_default();
        self.paths.insert(path, known.merge(methods));
    }

    pub(super) fn finish(self) -> Router {
        let mut router = Router::new();
        for (path, methods) in self.paths {
            router = router.route(path, methods.fallback(wrong_method));
        }
        router.fallback(unknown_path).with_state(self.state)
    }
}

async fn authorize(
    State((state, scope)): State<(ApiState, Scope)>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    state.0.keys.authorize(request.headers(), scope)?;
    Ok(next.run(request).await)
}

async fn wrong_method() -> ApiError {
    ApiError::refused(StatusCode::METHOD_NOT_ALLOWED, "this path does not take this method")
}

async fn unknown_path(uri: Uri) -> ApiError {
    ApiError::refused(StatusCode::NOT_FOUND, format!("there is no {}", uri.path()))
}
