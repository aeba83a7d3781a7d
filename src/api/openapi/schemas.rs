//! The schemas of the document: those of requests, in which null means absent, and those of responses.

use schemars::SchemaGenerator;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use crate::api::operation::SchemaOf;

/// The generators of both kinds of schemas.
#[derive(Debug)]
pub(super) struct Schemas {
    requests: SchemaGenerator,
    responses: SchemaGenerator,
}

impl Default for Schemas {
    fn default() -> Self {
        let settings = || {
            SchemaSettings::draft2020_12().with(|settings| {
                settings.definitions_path = "/components/schemas".into();
                settings.meta_schema = None;
            })
        };
        Self {
            requests: settings().for_deserialize().into_generator(),
            responses: settings().for_serialize().into_generator(),
        }
    }
}

impl Schemas {
    pub(super) fn request(&mut self, schema: SchemaOf) -> Value {
        let mut schema = schema(&mut self.requests).to_value();
        plain(&mut schema);
        schema
    }

    pub(super) fn response(&mut self, schema: SchemaOf) -> Value {
        let mut schema = schema(&mut self.responses).to_value();
        plain(&mut schema);
        never_null(&mut schema);
        schema
    }

    /// Returns the schemas that the others refer to, by name.
    pub(super) fn finish(mut self) -> Map<String, Value> {
        let mut requests = self.requests.take_definitions(true);
        let mut responses = self.responses.take_definitions(true);
        requests.values_mut().for_each(plain);
        responses.values_mut().for_each(|schema| {
            plain(schema);
            never_null(schema);
        });
        let twice =
            requests.iter().find(|(name, schema)| responses.get(*name).is_some_and(|other| other != *schema));
        debug_assert!(
            twice.is_none(),
            "a request and a response have different schemas of one name: {twice:?}"
        );
        requests.extend(responses);
        requests
    }
}

/// Applies a change to a schema, after the schemas inside it.
fn visit(schema: &mut Value, change: fn(&mut Map<String, Value>)) {
    match schema {
        Value::Array(items) => items.iter_mut().for_each(|item| visit(item, change)),
        Value::Object(fields) => {
            fields.values_mut().for_each(|field| visit(field, change));
            change(fields);
        }
        _ => {}
    }
}

/// Brings a schema into the form that generators of clients understand best.
fn plain(schema: &mut Value) {
    visit(schema, |fields| {
        one_line(fields);
        words(fields);
    });
}

/// Joins the lines of a doc comment; an empty line stays.
fn one_line(fields: &mut Map<String, Value>) {
    if let Some(Value::String(text)) = fields.get_mut("description") {
        let paragraphs: Vec<String> =
            text.split("\n\n").map(|paragraph| paragraph.replace('\n', " ")).collect();
        *text = paragraphs.join("\n\n");
    }
}

/// Writes the alternatives of an enum of words, each of which may have a description, as one list.
fn words(fields: &mut Map<String, Value>) {
    let Some(Value::Array(forms)) = fields.get("oneOf") else { return };
    let mut listed = Vec::new();
    let mut described = Vec::new();
    for form in forms {
        match (&form["const"], form["enum"].as_array()) {
            (Value::String(word), None) => {
                let description = form["description"].as_str().map(|text| format!("\n- `{word}`: {text}"));
                described.extend(description);
                listed.push(json!(word));
            }
            (Value::Null, Some(words)) if words.iter().all(Value::is_string) => listed.extend(words.clone()),
            _ => return,
        }
    }
    fields.remove("oneOf");
    fields.insert("type".to_owned(), json!("string"));
    fields.insert("enum".to_owned(), Value::Array(listed));
    if !described.is_empty() {
        let text = fields.get("description").and_then(Value::as_str).unwrap_or_default();
        let text = format!("{text}\n{}", described.concat());
        fields.insert("description".to_owned(), json!(text));
    }
}

/// Removes null from fields of responses that are left out instead.
fn never_null(schema: &mut Value) {
    visit(schema, |fields| {
        let required: Vec<Value> =
            fields.get("required").and_then(Value::as_array).cloned().unwrap_or_default();
        let Some(Value::Object(properties)) = fields.get_mut("properties") else { return };
        let absent = properties.iter_mut().filter(|(name, _)| !required.iter().any(|one| one == *name));
        absent.for_each(|(_, property)| without_null(property));
    });
}

/// Removes null from the values that a schema allows.
pub(super) fn without_null(schema: &mut Value) {
    let Value::Object(fields) = schema else { return };
    if let Some(Value::Array(kinds)) = fields.get_mut("type") {
        kinds.retain(|kind| kind != "null");
        if let [kind] = kinds.as_slice() {
            let kind = kind.clone();
            fields.insert("type".to_owned(), kind);
        }
    }
    if let Some(Value::Array(forms)) = fields.get_mut("anyOf") {
        forms.retain(|form| form["type"] != "null");
        if let [Value::Object(form)] = forms.as_slice() {
            let form = form.clone();
            fields.remove("anyOf");
            fields.extend(form);
        }
    }
}

#[cfg(test)]
mod tests {
    use schemars::JsonSchema;
    use serde::Serialize;

    use super::*;

    /// Words of a test.
    #[derive(Serialize, JsonSchema)]
    #[expect(dead_code, reason = "only its schema is used")]
    #[serde(rename_all = "lowercase")]
    enum Word {
        Plain,
        /// A word with a meaning
        /// in two lines.
        Described,
    }

    /// Fields of a test.
    #[derive(Serialize, JsonSchema)]
    struct Fields {
        nullable: Option<Word>,
        #[serde(skip_serializing_if = "Option::is_none")]
        absent: Option<Word>,
        #[serde(skip_serializing_if = "Option::is_none")]
        text: Option<String>,
    }

    fn fields(generator: &mut SchemaGenerator) -> schemars::Schema {
        generator.subschema_for::<Fields>()
    }

    #[test]
    fn words_are_one_list_and_fields_that_are_left_out_are_never_null() {
        let mut schemas = Schemas::default();
        assert_eq!(schemas.response(fields), json!({"$ref": "#/components/schemas/Fields"}));
        let schemas = schemas.finish();
        let word = &schemas["Word"];
        assert_eq!((&word["enum"], &word["type"]), (&json!(["plain", "described"]), &json!("string")));
        let description = "Words of a test.\n\n- `described`: A word with a meaning in two lines.";
        assert_eq!(word["description"], description);
        let properties = &schemas["Fields"]["properties"];
        let reference = json!({"$ref": "#/components/schemas/Word"});
        assert_eq!(properties["absent"], reference);
        assert_eq!(properties["text"], json!({"type": "string"}));
        assert_eq!(properties["nullable"], json!({"anyOf": [reference, {"type": "null"}]}));
        assert_eq!(schemas["Fields"]["required"], json!(["nullable"]));
    }

    #[test]
    fn fields_of_requests_may_be_null_and_may_be_missing() {
        let mut schemas = Schemas::default();
        schemas.request(fields);
        let schemas = schemas.finish();
        assert_eq!(schemas["Fields"]["properties"]["text"], json!({"type": ["string", "null"]}));
        assert_eq!(schemas["Fields"].get("required"), None);
    }
}
