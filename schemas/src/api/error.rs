//! The one shape of every error answer.

use serde::{Deserialize, Serialize};

use crate::validate::FieldErrors;

/// `{"code", "message", "details"?}`; clients switch on `code`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    pub code: String,
    pub message: String,
    /// One entry for each problem of a request; its message starts with the field's path.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub details: Vec<ErrorDetail>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorDetail {
    pub code: String,
    pub message: String,
}

impl ErrorBody {
    pub fn new(code: impl Into<String>, message: impl Into<String>) -> Self {
        Self { code: code.into(), message: message.into(), details: Vec::new() }
    }
}

impl From<&FieldErrors> for ErrorBody {
    /// The first problem's code stands for the request.
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
