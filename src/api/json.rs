//! JSON of bodies: a name that occurs twice in an object is refused, because readers disagree about which value counts.

use std::fmt;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use stead_schemas::validate::printable;

use super::ApiError;

/// Limit on a name that is shown in an error, in characters.
const NAME_CHARS_MAX: usize = 64;

/// Parses the JSON of a body; an empty body becomes `null`, which every reader takes as no fields given.
pub(super) fn json(body: Result<Bytes, BytesRejection>) -> Result<Value, ApiError> {
    let body = body?;
    if body.iter().all(u8::is_ascii_whitespace) {
        return Ok(Value::Null);
    }
    serde_json::from_slice::<Unambiguous>(&body)
        .map(|Unambiguous(value)| value)
        .map_err(|error| ApiError::bad_request("invalid_request", format!("body is not JSON: {error}")))
}

/// A value whose objects have each name once.
struct Unambiguous(Value);

impl<'de> Deserialize<'de> for Unambiguous {
    fn deserialize<De: Deserializer<'de>>(deserializer: De) -> Result<Self, De::Error> {
        deserializer.deserialize_any(Reader).map(Self)
    }
}

struct Reader;

impl<'de> Visitor<'de> for Reader {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<Items: SeqAccess<'de>>(self, mut items: Items) -> Result<Value, Items::Error> {
        let mut list = Vec::new();
        while let Some(Unambiguous(value)) = items.next_element()? {
            list.push(value);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<Entries: MapAccess<'de>>(self, mut fields: Entries) -> Result<Value, Entries::Error> {
        let mut map = Map::new();
        while let Some(name) = fields.next_key::<String>()? {
            if map.contains_key(&name) {
                let name = printable(&name, NAME_CHARS_MAX);
                return Err(Entries::Error::custom(format_args!(
                    "the name {name:?} occurs twice in one object"
                )));
            }
            let Unambiguous(value) = fields.next_value()?;
            map.insert(name, value);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Value, String> {
        json(Ok(Bytes::copy_from_slice(text.as_bytes()))).map_err(|error| format!("{error:?}"))
    }

    #[test]
    fn a_body_is_read_as_serde_json_reads_it() {
        let text =
            r#"{"a": [1, -2, 1.5, true, null, "x\u00e9", {"b": {}}], "c": 18446744073709551615, "d": 1e3}"#;
        assert_eq!(read(text).expect("JSON"), serde_json::from_str::<Value>(text).expect("JSON"));
        assert_eq!(read(" \n").expect("empty"), Value::Null);
        for wrong in ["{", "[1,]", "{\"a\":}", "nul", "1 2"] {
            assert!(read(wrong).expect_err(wrong).contains("body is not JSON"), "{wrong}");
        }
        let deep = "[".repeat(100_000);
        assert!(read(&deep).is_err(), "no stack is deep enough");
    }

    #[test]
    fn a_name_that_occurs_twice_is_refused_at_any_depth() {
        for twice in [r#"{"name": "a", "name": "b"}"#, r#"[{"env": {"x": {"name": 1, "na\u006de": 2}}}]"#] {
            assert!(read(twice).expect_err(twice).contains(r#"\"name\" occurs twice"#), "{twice}");
        }
        assert!(read(r#"[{"name": 1}, {"name": 2}]"#).is_ok());
    }
}
