//! The common shape of every error response.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::validate::FieldErrors;

/// The error body, `{"code", "message", "details"?}`; clients switch on `code`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "Error")]
pub struct ErrorBody {
    /// Word for programs, such as `not_found`.
    pub code: String,
    /// Sentence for people.
    pub message: String,
    /// The problems of the request, an entry each; every message starts with the field's path.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub details: Vec<ErrorDetail>,
}

/// A problem of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "ErrorDetail")]
pub struct ErrorDetail {
    /// Word for programs, such as `invalid_size`.
    pub code: String,
    /// Sentence for people; it starts with the path of the field.
    pub message: String,
}

impl ErrorBody {
    pub fn new(code: impl Into<String>, message: impl Into<String>) -> Self {
        Self { code: code.into(), message: message.into(), details: Vec::new() }
    }
}

impl From<&FieldErrors> for ErrorBody {
    /// Takes the first problem's code as the code of the request.
    fn from(errors: &FieldErrors) -> Self {
        let details: Vec<ErrorDetail> = errors
            .iter()
            .map(|error| ErrorDetail {
                code: error.code.to_owned(),
                message: format!("{} {}", error.path, error.message),
            })
            .collect();
        let code = details.first().map_or("invalid_request", |detail| detail.code.as_str()).to_owned();
        Self { code, message: errors.to_string(), details }
    }
}
