//! JSON schemas of values that are written as text on the wire, for the OpenAPI document.
//!
//! A pattern accepts every text that the reader of the value accepts. Ranges of sizes and durations cannot
//! be written as a pattern, so the descriptions of fields name them.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};

use crate::instance::Secret;
use crate::limits;
use crate::numbers::Generation;
use crate::quantity::{Bytes, GoDuration};

/// A decimal number without a sign.
const NUMBER: &str = r"([0-9]+([.][0-9]*)?|[.][0-9]+)";
/// The unit of a size; none means bytes.
const SIZE_UNIT: &str = "([kKmMgGtT]([iI]?[bB])?|[bB])?";
/// The unit of a rate: bits per second in decimal units, bytes per second in binary units.
const RATE_UNIT: &str = r"([kKmMgG]?[bB][pP][sS]|[kKmMgG]?[bB]?|([kKmMgGtT]([iI]?[bB])?|[bB])?\s*/[sS])";
/// A label of a host name, or a capture in braces in its place.
const HOST_LABEL: &str = r"([a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?|[{][a-zA-Z][a-zA-Z0-9_-]{0,62}[}])";
/// The characters of the keys and values of tags.
const TAG: &str = "^[A-Za-z0-9 _.:/=+@-]*$";
/// The form of an id.
pub(super) const ID: &str = "^[a-z][a-z0-9]{23}$";
/// The form of a resource name.
pub(super) const NAME: &str = "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$";
/// Text without a NUL.
pub(super) const NO_NUL: &str = r"^[^\u0000]*$";

/// Declares types that stand for a form of text and have only a schema.
macro_rules! texts {
    ($($(#[$doc:meta])* $name:ident => $schema:expr;)*) => { $(
        $(#[$doc])*
        #[derive(Debug)]
        pub enum $name {}

        written_in_place!($name => $schema);
    )* };
}

/// Gives a type a schema that is repeated wherever the type is used.
macro_rules! written_in_place {
    ($name:ty => $schema:expr) => {
        impl JsonSchema for $name {
            fn inline_schema() -> bool {
                true
            }
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }
            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                $schema
            }
        }
    };
}

texts! {
    /// A time in the form of RFC 3339.
    Time => json_schema!({"type": "string", "format": "date-time"});
    /// A size with a binary unit.
    Size => quantity(NUMBER, SIZE_UNIT, "1.5GB");
    /// A size of zero, which is all that is accepted where sizes are not supported yet.
    /// A rate of bits with a decimal unit, or of bytes with a binary one.
    RateText => quantity(NUMBER, RATE_UNIT, "100MB/s");
    /// An id of 24 characters.
    Id => json_schema!({"type": "string", "pattern": ID});
    /// A name of an existing resource.
    ResourceName => json_schema!({"type": "string", "pattern": NAME, "maxLength": limits::NAME_BYTES_MAX});
    /// A name for a new resource: it may not have the form of an id.
    NewName => json_schema!({
        "type": "string",
        "pattern": NAME,
        "maxLength": limits::NAME_BYTES_MAX,
        "not": {"pattern": ID},
    });
    /// A reference of an image, in any of its spellings.
    ImageReference => json_schema!({
        "type": "string",
        "minLength": 1,
        "maxLength": limits::IMAGE_REF_BYTES_MAX,
        "examples": ["docker.io/library/alpine:3.20"],
    });
    /// A host name, whose labels may be captures.
    HostPattern => json_schema!({
        "type": "string",
        "pattern": format!("^{HOST_LABEL}([.]{HOST_LABEL})*$"),
        "maxLength": limits::HOSTNAME_BYTES_MAX,
        "examples": ["{instance}.example.com"],
    });
    /// The name or id of an instance, or a capture of a host name.
    IngressTargetName => json_schema!({
        "type": "string",
        "pattern": r"^([a-z0-9]([a-z0-9-]*[a-z0-9])?|[{][a-zA-Z][a-zA-Z0-9_-]*[}])$",
        "maxLength": limits::NAME_BYTES_MAX + 2,
    });
    /// Tags: texts by key.
    TagMap => json_schema!({
        "type": "object",
        "maxProperties": limits::TAGS_MAX,
        "propertyNames": {"pattern": TAG, "minLength": 1, "maxLength": limits::TAG_KEY_BYTES_MAX},
        "additionalProperties": {"type": "string", "pattern": TAG, "maxLength": limits::TAG_VALUE_BYTES_MAX},
    });
    /// Environment variables: values by name.
    EnvMap => json_schema!({
        "type": "object",
        "maxProperties": limits::ENV_MAX,
        "propertyNames": {"pattern": r"^[^=\u0000]+$"},
        "additionalProperties": {"type": "string", "pattern": NO_NUL, "maxLength": limits::ENV_VAR_BYTES_MAX},
    });
    /// Changes of environment variables: new values by name, or null to remove a variable.
    EnvChanges => json_schema!({
        "type": "object",
        "maxProperties": limits::ENV_MAX,
        "propertyNames": {"pattern": r"^[^=\u0000]+$"},
        "additionalProperties": {
            "type": ["string", "null"], "pattern": NO_NUL, "maxLength": limits::ENV_VAR_BYTES_MAX,
        },
    });
    /// The arguments of a program.
    Arguments => json_schema!({
        "type": "array",
        "maxItems": limits::ARGV_MAX,
        "items": {"type": "string", "pattern": NO_NUL, "maxLength": limits::ARG_BYTES_MAX},
    });
    /// The value `false`, which is all that is accepted where something is not supported yet.
    False => json_schema!({"type": "boolean", "not": {"const": true}});
    /// Bytes without a structure of their own.
    Binary => json_schema!({"type": "string", "format": "binary"});
    /// Bytes in base64.
    Base64 => json_schema!({"type": "string", "contentEncoding": "base64"});
}

written_in_place!(GoDuration => json_schema!({
    "type": "string",
    "pattern": format!("^[+]?(0|({NUMBER}(ns|us|µs|μs|ms|s|m|h))+)$"),
    "examples": ["1m30s"],
}));
written_in_place!(Generation => json_schema!({"type": "integer", "format": "uint64", "minimum": 0}));
written_in_place!(Bytes => json_schema!({"type": "integer", "format": "uint64", "minimum": 0}));
written_in_place!(Secret => json_schema!({"type": "string"}));

fn quantity(number: &str, unit: &str, example: &str) -> Schema {
    json_schema!({
        "type": "string",
        "pattern": format!(r"^\s*{number}\s*{unit}\s*$"),
        "examples": [example],
    })
}
