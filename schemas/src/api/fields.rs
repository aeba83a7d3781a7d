//! Reads a JSON object field by field. Every problem is noted under its path; reading does not stop at the
//! first.
//!
//! `null` counts as absent, because the SDKs send it. A field that the request does not have is a problem
//! too: see [`Fields::finish`].

use std::collections::BTreeMap;
use std::fmt::Display;
use std::str::FromStr;

use serde_json::{Map, Value};

use crate::validate::{FieldErrors, printable};

/// A JSON object that is being read.
#[derive(Debug)]
pub struct Fields {
    path: String,
    /// The code of problems that have no code of their own.
    code: &'static str,
    object: Map<String, Value>,
}

/// The default code of problems.
const INVALID: &str = "invalid_request";
/// Number of characters of an unknown key that a message repeats.
const KEY_CHARS_MAX: usize = 64;

impl Fields {
    /// Starts to read a request's body.
    pub fn body(value: Value, errors: &mut FieldErrors) -> Self {
        Self::body_of(value, INVALID, errors)
    }

    /// Starts to read a request's body; its problems carry `code`.
    pub fn body_of(value: Value, code: &'static str, errors: &mut FieldErrors) -> Self {
        Self::at(String::new(), code, value, errors)
    }

    fn at(path: String, code: &'static str, value: Value, errors: &mut FieldErrors) -> Self {
        let object = match value {
            Value::Object(object) => object,
            other => {
                let field_path = if path.is_empty() { "body" } else { &path };
                errors.push(field_path, code, format!("must be an object, not {}", kind(&other)));
                Map::new()
            }
        };
        Self { path, code, object }
    }

    /// Returns the full path of a field of this object.
    #[must_use]
    pub fn path(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// Takes a field out; an absent field and `null` are the same.
    pub fn take(&mut self, key: &str) -> Option<Value> {
        #[cfg(test)]
        super::body::tests::note(self.path(key));
        self.object.remove(key).filter(|value| !value.is_null())
    }

    pub fn text(&mut self, key: &str, errors: &mut FieldErrors) -> Option<String> {
        let value = self.take(key)?;
        self.as_text(key, value, errors)
    }

    fn as_text(&self, key: &str, value: Value, errors: &mut FieldErrors) -> Option<String> {
        match value {
            Value::String(text) => Some(text),
            other => self.wrong(key, self.code, "a string", &other, errors),
        }
    }

    /// Takes a required string.
    pub fn required_text(&mut self, key: &str, errors: &mut FieldErrors) -> Option<String> {
        let Some(value) = self.take(key) else {
            errors.push(self.path(key), self.code, "is required");
            return None;
        };
        self.as_text(key, value, errors)
    }

    /// Takes a string that parses into `T`; its problems carry `code`.
    pub fn parsed<T>(&mut self, key: &str, code: &'static str, errors: &mut FieldErrors) -> Option<T>
    where
        T: FromStr,
        T::Err: Display,
    {
        let path = self.path(key);
        match self.take(key)? {
            Value::String(text) => errors.take(&path, code, text.parse()),
            other => {
                errors.push(path, code, format!("must be a string, not {}", kind(&other)));
                None
            }
        }
    }

    pub fn flag(&mut self, key: &str, errors: &mut FieldErrors) -> Option<bool> {
        self.flag_of(key, self.code, errors)
    }

    /// Takes a boolean; its problem carries `code`. The other methods that end with `_of` report with `code`
    /// too.
    pub fn flag_of(&mut self, key: &str, code: &'static str, errors: &mut FieldErrors) -> Option<bool> {
        match self.take(key)? {
            Value::Bool(flag) => Some(flag),
            other => self.wrong(key, code, "true or false", &other, errors),
        }
    }

    /// True if the field is present, whether its value is valid or not.
    #[must_use]
    pub fn has(&self, key: &str) -> bool {
        self.object.get(key).is_some_and(|value| !value.is_null())
    }

    /// True if no field is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.object.values().all(Value::is_null)
    }

    /// Takes a whole number within bounds.
    pub fn number(
        &mut self,
        key: &str,
        bounds: std::ops::RangeInclusive<u32>,
        errors: &mut FieldErrors,
    ) -> Option<u32> {
        let value = self.take(key)?;
        match whole(&value).and_then(|number| u32::try_from(number).ok()) {
            Some(number) if bounds.contains(&number) => Some(number),
            _ => {
                let (low, high) = (bounds.start(), bounds.end());
                errors.push(
                    self.path(key),
                    self.code,
                    format!("must be a whole number from {low} to {high}"),
                );
                None
            }
        }
    }

    /// Takes a whole number of any size.
    pub fn count(&mut self, key: &str, errors: &mut FieldErrors) -> Option<u64> {
        let value = self.take(key)?;
        let count = whole(&value);
        if count.is_none() {
            errors.push(self.path(key), self.code, "must be a whole number, and not negative");
        }
        count
    }

    /// Takes a list of strings within bounds of count and size.
    pub fn texts(
        &mut self,
        key: &str,
        count_max: usize,
        bytes_max: usize,
        errors: &mut FieldErrors,
    ) -> Option<Vec<String>> {
        self.texts_of(key, self.code, count_max, bytes_max, errors)
    }

    pub fn texts_of(
        &mut self,
        key: &str,
        code: &'static str,
        count_max: usize,
        bytes_max: usize,
        errors: &mut FieldErrors,
    ) -> Option<Vec<String>> {
        let items = self.list_of(key, code, errors)?;
        if items.len() > count_max {
            errors.push(
                self.path(key),
                code,
                format!("has {} entries; at most {count_max} are allowed", items.len()),
            );
            return None;
        }
        let mut texts = Vec::with_capacity(items.len());
        for (index, item) in items.into_iter().enumerate() {
            let path = format!("{}[{index}]", self.path(key));
            match item {
                Value::String(text) if text.contains('\0') => {
                    errors.push(path, code, "must not contain a NUL")
                }
                Value::String(text) if text.len() > bytes_max => {
                    errors.push(path, code, format!("is longer than {bytes_max} bytes"));
                }
                Value::String(text) => texts.push(text),
                other => errors.push(path, code, format!("must be a string, not {}", kind(&other))),
            }
        }
        Some(texts)
    }

    /// Takes a map of strings.
    pub fn map(&mut self, key: &str, errors: &mut FieldErrors) -> Option<BTreeMap<String, String>> {
        let texts = self.map_of(key, errors, false)?;
        Some(texts.into_iter().filter_map(|(name, text)| Some((name, text?))).collect())
    }

    /// Takes a map of strings and nulls.
    pub fn map_of_optional(
        &mut self,
        key: &str,
        errors: &mut FieldErrors,
    ) -> Option<BTreeMap<String, Option<String>>> {
        self.map_of(key, errors, true)
    }

    /// Takes a map of strings, and perhaps of nulls.
    fn map_of(
        &mut self,
        key: &str,
        errors: &mut FieldErrors,
        is_null_allowed: bool,
    ) -> Option<BTreeMap<String, Option<String>>> {
        let object = match self.take(key)? {
            Value::Object(object) => object,
            other => return self.wrong(key, self.code, "an object of strings", &other, errors),
        };
        let mut map = BTreeMap::new();
        for (name, value) in object {
            let path = format!("{}[{}]", self.path(key), printable(&name, KEY_CHARS_MAX));
            match value {
                Value::String(text) => drop(map.insert(name, Some(text))),
                Value::Null if is_null_allowed => drop(map.insert(name, None)),
                other => errors.push(path, self.code, format!("must be a string, not {}", kind(&other))),
            }
        }
        Some(map)
    }

    pub fn list(&mut self, key: &str, errors: &mut FieldErrors) -> Option<Vec<Value>> {
        self.list_of(key, self.code, errors)
    }

    pub fn list_of(&mut self, key: &str, code: &'static str, errors: &mut FieldErrors) -> Option<Vec<Value>> {
        match self.take(key)? {
            Value::Array(items) => Some(items),
            other => self.wrong(key, code, "a list", &other, errors),
        }
    }

    /// Takes a nested object.
    pub fn object(&mut self, key: &str, errors: &mut FieldErrors) -> Option<Self> {
        let value = self.take(key)?;
        Some(Self::at(self.path(key), self.code, value, errors))
    }

    pub fn object_of(&mut self, key: &str, code: &'static str, errors: &mut FieldErrors) -> Option<Self> {
        match self.take(key)? {
            value @ Value::Object(_) => Some(Self::at(self.path(key), self.code, value, errors)),
            other => self.wrong(key, code, "an object", &other, errors),
        }
    }

    /// Takes the objects of a list.
    pub fn objects(&mut self, key: &str, errors: &mut FieldErrors) -> Vec<Self> {
        let items = self.list(key, errors).unwrap_or_default();
        let (path, code) = (self.path(key), self.code);
        items
            .into_iter()
            .enumerate()
            .map(|(index, item)| Self::at(format!("{path}[{index}]"), code, item, errors))
            .collect()
    }

    /// Returns the nested objects of a map, by key.
    pub fn entries(self, errors: &mut FieldErrors) -> Vec<(String, Self)> {
        let Self { path, code, object } = self;
        object
            .into_iter()
            .map(|(key, value)| {
                let at = format!("{path}[{}]", printable(&key, KEY_CHARS_MAX));
                (key, Self::at(at, code, value, errors))
            })
            .collect()
    }

    /// Reports the fields that are left as unknown. Otherwise a misspelt field would be ignored silently and
    /// its value lost.
    pub fn finish(self, errors: &mut FieldErrors) {
        for key in self.object.keys() {
            errors.push(
                self.path(&printable(key, KEY_CHARS_MAX)),
                self.code,
                "is not a field of this request",
            );
        }
    }

    fn wrong<T>(
        &self,
        key: &str,
        code: &'static str,
        expected: &str,
        found: &Value,
        errors: &mut FieldErrors,
    ) -> Option<T> {
        errors.push(self.path(key), code, format!("must be {expected}, not {}", kind(found)));
        None
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Returns a whole number. The wire's `number` may arrive as 2.0.
fn whole(value: &Value) -> Option<u64> {
    let from_fraction = || {
        let number = value.as_f64().filter(|number| number.fract() == 0.0)?;
        format!("{number:.0}").parse().ok()
    };
    value.as_u64().or_else(from_fraction)
}
