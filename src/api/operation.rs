//! An operation of the API: a route with its promises to clients, from which the router, the scopes and the
//! OpenAPI document are made.

use axum::http::StatusCode;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use stead_schemas::api::ErrorBody;

use super::rule::{Rule, Verb};

/// A function that makes the schema of a type.
pub(super) type SchemaOf = fn(&mut SchemaGenerator) -> Schema;

/// A content type of a body.
pub(super) const JSON: &str = "application/json";

/// The query parameters of an operation.
#[derive(Debug, Clone, Copy)]
pub(super) enum Parameters {
    /// The fields of a type; others are refused.
    Fields(SchemaOf),
    /// Any: the route is not served yet, so it reads none and refuses none.
    Any,
}

/// The body of a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Body {
    pub(super) content: &'static str,
    pub(super) schema: SchemaOf,
    pub(super) is_required: bool,
}

/// A response other than an error of the common form.
#[derive(Debug, Clone)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    /// The content types of the body, each with its schema; empty without a body.
    pub(super) contents: Vec<(&'static str, SchemaOf)>,
}

/// The text frames of a WebSocket, by their sender.
#[derive(Debug, Clone, Default)]
pub(super) struct Frames {
    pub(super) client: Vec<SchemaOf>,
    pub(super) server: Vec<SchemaOf>,
    /// Frames that both sides send.
    pub(super) both: Vec<SchemaOf>,
}

/// An entry of the table of routes.
#[derive(Debug, Clone)]
pub(super) struct Operation {
    pub(super) verb: Verb,
    /// The path, in the form of the router.
    pub(super) path: &'static str,
    /// The path as clients see it, where the router cannot express it.
    pub(super) client_path: Option<&'static str>,
    pub(super) id: &'static str,
    pub(super) summary: &'static str,
    /// The rule that requests are checked by; `None` for a public route.
    pub(super) rule: Option<Rule>,
    pub(super) query: Parameters,
    pub(super) body: Option<Body>,
    /// The responses other than errors of the common form.
    pub(super) answers: Vec<Answer>,
    pub(super) frames: Option<Frames>,
    /// Statuses of errors beyond those that all operations of this form have.
    pub(super) errors: Vec<StatusCode>,
}

/// The type without fields: the parameters of a route that reads none.
#[derive(Debug, JsonSchema)]
struct Nothing {}

fn inline<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    T::json_schema(generator)
}

fn referenced<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

/// Makes the schema of an error.
pub(super) fn error_schema(generator: &mut SchemaGenerator) -> Schema {
    referenced::<ErrorBody>(generator)
}

impl Operation {
    fn new(verb: Verb, path: &'static str, id: &'static str, summary: &'static str) -> Self {
        Self {
            verb,
            path,
            client_path: None,
            id,
            summary,
            rule: None,
            query: Parameters::Fields(inline::<Nothing>),
            body: None,
            answers: Vec::new(),
            frames: None,
            errors: Vec::new(),
        }
    }

    /// Sets the rule; a route without one is public.
    pub(super) fn under(self, rule: Rule) -> Self {
        Self { rule: Some(rule), ..self }
    }

    pub(super) fn seen_as(self, path: &'static str) -> Self {
        Self { client_path: Some(path), ..self }
    }

    pub(super) fn query<T: JsonSchema>(self) -> Self {
        Self { query: Parameters::Fields(inline::<T>), ..self }
    }

    pub(super) fn takes<T: JsonSchema>(self) -> Self {
        self.takes_content::<T>(JSON)
    }

    pub(super) fn takes_content<T: JsonSchema>(self, content: &'static str) -> Self {
        Self { body: Some(Body { content, schema: referenced::<T>, is_required: true }), ..self }
    }

    /// Sets a body that may be left out.
    pub(super) fn may_take<T: JsonSchema>(self) -> Self {
        Self { body: Some(Body { content: JSON, schema: referenced::<T>, is_required: false }), ..self }
    }

    pub(super) fn answers<T: JsonSchema>(self, status: StatusCode) -> Self {
        self.answers_content::<T>(status, JSON)
    }

    /// Adds a content type of a response.
    pub(super) fn answers_content<T: JsonSchema>(
        mut self,
        status: StatusCode,
        content: &'static str,
    ) -> Self {
        let content: (_, SchemaOf) = (content, referenced::<T>);
        match self.answers.iter_mut().find(|answer| answer.status == status) {
            Some(answer) => answer.contents.push(content),
            None => self.answers.push(Answer { status, contents: vec![content] }),
        }
        self
    }

    pub(super) fn answers_nothing(mut self) -> Self {
        self.answers.push(Answer { status: StatusCode::NO_CONTENT, contents: Vec::new() });
        self
    }

    /// Marks an upgrade to a WebSocket, whose first text frame is `T`.
    pub(super) fn upgrades<T: JsonSchema>(mut self) -> Self {
        self.answers.push(Answer { status: StatusCode::SWITCHING_PROTOCOLS, contents: Vec::new() });
        Self { frames: Some(Frames { client: vec![referenced::<T>], ..Frames::default() }), ..self }
    }

    /// Adds a text frame of the client of a WebSocket, and one of the server.
    pub(super) fn frames<T: JsonSchema, K: JsonSchema>(mut self) -> Self {
        let frames = self.frames.get_or_insert_default();
        frames.client.push(referenced::<T>);
        frames.server.push(referenced::<K>);
        self
    }

    /// Adds a text frame that both sides of a WebSocket send.
    pub(super) fn frames_of_both<T: JsonSchema>(mut self) -> Self {
        self.frames.get_or_insert_default().both.push(referenced::<T>);
        self
    }

    pub(super) fn errors(self, errors: &[StatusCode]) -> Self {
        Self { errors: errors.to_vec(), ..self }
    }

    /// Marks a route of the contract that is not served yet.
    pub(super) fn not_yet(self, status: StatusCode) -> Self {
        Self { query: Parameters::Any, errors: vec![status], ..self }
    }

    /// Returns the path as clients see it.
    pub(super) fn shown_path(&self) -> String {
        self.client_path.map_or_else(|| self.path.replace("{*", "{"), ToOwned::to_owned)
    }

    /// Returns the names of the parameters in the path as clients see it.
    pub(super) fn path_parameters(&self) -> Vec<String> {
        let path = self.shown_path();
        let names = path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
        names.map(ToOwned::to_owned).collect()
    }

    /// Returns the names of the query parameters; `None` if none are refused.
    pub(super) fn query_names(&self) -> Option<Vec<String>> {
        let Parameters::Fields(schema) = self.query else { return None };
        let schema = schema(&mut SchemaGenerator::default());
        let properties = schema.get("properties").and_then(serde_json::Value::as_object);
        Some(properties.into_iter().flat_map(serde_json::Map::keys).cloned().collect())
    }
}

pub(super) fn get(path: &'static str, id: &'static str, summary: &'static str) -> Operation {
    Operation::new(Verb::Get, path, id, summary)
}

pub(super) fn post(path: &'static str, id: &'static str, summary: &'static str) -> Operation {
    Operation::new(Verb::Post, path, id, summary)
}

pub(super) fn put(path: &'static str, id: &'static str, summary: &'static str) -> Operation {
    Operation::new(Verb::Put, path, id, summary)
}

pub(super) fn patch(path: &'static str, id: &'static str, summary: &'static str) -> Operation {
    Operation::new(Verb::Patch, path, id, summary)
}

pub(super) fn delete(path: &'static str, id: &'static str, summary: &'static str) -> Operation {
    Operation::new(Verb::Delete, path, id, summary)
}
