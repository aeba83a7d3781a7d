//! Ingresses on the wire.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::fields::Fields;
use super::schema::{TagMap, Time};
use crate::condition::Condition;
use crate::ingress::{
    HeaderAuth, Hostname, Ingress as Kind, IngressRule as Rule, IngressTarget as Target, TargetName,
};
use crate::instance::Secret;
use crate::limits::{HEADER_AUTH_BYTES, HEADER_NAME_BYTES_MAX, INGRESS_RULES_MAX};
use crate::meta::{Object, Tags};
use crate::names::Name;
use crate::validate::{FieldErrors, tags_of};

const INVALID: &str = "bad_request";
const UNSUPPORTED: &str = "not_supported";
const PORT_DEFAULT: u16 = 80;

/// Names of headers that have a meaning for some party on the way, besides those that begin with
/// [`RESERVED_PREFIXES`].
const RESERVED: [&str; 21] = [
    "authorization",
    "authentication-info",
    "www-authenticate",
    "cookie",
    "cookie2",
    "set-cookie",
    "set-cookie2",
    "host",
    "connection",
    "keep-alive",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "content-length",
    "content-encoding",
    "content-type",
    "expect",
    "forwarded",
    "via",
    "x-real-ip",
];
const RESERVED_PREFIXES: [&str; 3] = ["proxy-", "x-forwarded-", "sec-"];

/// The body of `POST /ingresses`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IngressRequest {
    pub name: Name,
    pub rules: Vec<Rule>,
    pub tags: Tags,
}

impl IngressRequest {
    /// Reads the body.
    ///
    /// # Errors
    /// Returns every problem of the body.
    pub fn read(body: Value) -> Result<Self, FieldErrors> {
        let mut errors = FieldErrors::default();
        let mut fields = Fields::body_of(body, INVALID, &mut errors);
        let name = fields.required_text("name", &mut errors);
        let name = name.and_then(|name| errors.take("name", INVALID, Name::new_resource(&name)));
        let given = fields.objects("rules", &mut errors);
        if !(1..=INGRESS_RULES_MAX).contains(&given.len()) {
            errors.push("rules", INVALID, format!("must have from 1 to {INGRESS_RULES_MAX} entries"));
        }
        let rules: Vec<Rule> =
            given.into_iter().take(INGRESS_RULES_MAX).filter_map(|one| rule(one, &mut errors)).collect();
        let tags = fields.map("tags", &mut errors).unwrap_or_default();
        tags_of(&mut errors, "tags", INVALID, &tags);
        fields.finish(&mut errors);
        match name {
            Some(name) if errors.is_empty() => Ok(Self { name, rules, tags }),
            _ => Err(errors),
        }
    }
}

fn rule(mut fields: Fields, errors: &mut FieldErrors) -> Option<Rule> {
    let matched = required(&mut fields, "match", errors).and_then(|mut match_fields| {
        let hostname: Option<Hostname> = parsed(&mut match_fields, "hostname", errors);
        let port = port(&mut match_fields, errors).unwrap_or(PORT_DEFAULT);
        match_fields.finish(errors);
        Some((hostname?, port))
    });
    let target = required(&mut fields, "target", errors).and_then(|mut target| {
        let path = target.path("instance");
        let instance: Option<TargetName> = parsed(&mut target, "instance", errors);
        if !target.has("port") {
            errors.push(target.path("port"), INVALID, "is required");
        }
        let port = port(&mut target, errors);
        target.finish(errors);
        let is_known = |name: &str| matched.iter().any(|(host, _)| host.captures().any(|one| one == name));
        if let (Some(TargetName::Capture(name)), Some(_)) = (&instance, &matched)
            && !is_known(name)
        {
            errors.push(path, INVALID, format!("is {{{name}}}, which is no label of the hostname"));
        }
        Some(Target { instance: instance?, port: port? })
    });
    let is_tls = fields.flag("tls", errors).unwrap_or(false);
    if is_tls {
        errors.push(fields.path("tls"), UNSUPPORTED, "is not supported by this server yet");
    }
    if fields.flag("redirect_http", errors).unwrap_or(false) && !is_tls {
        errors.push(fields.path("redirect_http"), INVALID, "needs tls");
    }
    let auth = fields.object("request_header_auth", errors).map(|given| header_auth(given, errors));
    fields.finish(errors);
    let (hostname, port) = matched?;
    let auth = match auth {
        Some(auth) => Some(auth?),
        None => None,
    };
    Some(Rule { hostname, port, target: target?, auth })
}

fn required(fields: &mut Fields, key: &str, errors: &mut FieldErrors) -> Option<Fields> {
    if !fields.has(key) {
        errors.push(fields.path(key), INVALID, "is required");
    }
    fields.object(key, errors)
}

fn parsed<T>(fields: &mut Fields, key: &str, errors: &mut FieldErrors) -> Option<T>
where
    T: std::str::FromStr<Err = crate::names::NameError>,
{
    let text = fields.required_text(key, errors)?;
    errors.take(&fields.path(key), INVALID, text.parse())
}

fn port(fields: &mut Fields, errors: &mut FieldErrors) -> Option<u16> {
    fields.number("port", 1..=u32::from(u16::MAX), errors).and_then(|port| u16::try_from(port).ok())
}

fn header_auth(mut fields: Fields, errors: &mut FieldErrors) -> Option<HeaderAuth> {
    let header = fields.required_text("header", errors).filter(|header| {
        let problem = header_problem(header);
        if let Some(problem) = problem {
            errors.push(fields.path("header"), INVALID, problem);
        }
        problem.is_none()
    });
    let value = fields.required_text("value", errors).filter(|value| {
        // A header can carry only these characters; a blank at either end would not arrive.
        let is_fit = HEADER_AUTH_BYTES.contains(&value.len())
            && value.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic())
            && value.trim() == value;
        if !is_fit {
            let (least, most) = (HEADER_AUTH_BYTES.start(), HEADER_AUTH_BYTES.end());
            let rule =
                format!("must be {least} to {most} printable ASCII characters without blanks around them");
            errors.push(fields.path("value"), INVALID, rule);
        }
        is_fit
    });
    fields.finish(errors);
    Some(HeaderAuth { header: header?, value: Secret(value?) })
}

fn header_problem(header: &str) -> Option<&'static str> {
    let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    let is_name = (1..=HEADER_NAME_BYTES_MAX).contains(&header.len()) && header.bytes().all(is_token);
    if !is_name {
        return Some("must be the name of a header");
    }
    let name = header.to_ascii_lowercase();
    let is_reserved =
        RESERVED.contains(&name.as_str()) || RESERVED_PREFIXES.iter().any(|prefix| name.starts_with(prefix));
    is_reserved.then_some("is a header with a meaning of its own; choose one that has none")
}

/// An ingress as clients read it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Ingress {
    /// Id of the ingress.
    pub id: String,
    /// Name of the ingress.
    pub name: String,
    /// Rules of the ingress.
    pub rules: Vec<IngressRule>,
    /// Time of the creation.
    #[schemars(with = "Time")]
    pub created_at: Timestamp,
    /// Tags of the ingress.
    #[serde(default, skip_serializing_if = "Tags::is_empty")]
    #[schemars(with = "TagMap")]
    pub tags: Tags,
    /// An addition to Hypeman's API: reports whether the ports are open, and why not.
    #[serde(default)]
    pub conditions: Vec<Condition>,
}

/// A rule that leads requests to an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct IngressRule {
    /// Requests that the rule is about.
    #[serde(rename = "match")]
    pub matched: IngressMatch,
    /// Instance that answers them.
    pub target: IngressTarget,
    /// True for HTTPS.
    pub tls: bool,
    /// True if HTTP is redirected to HTTPS.
    pub redirect_http: bool,
    /// Header without which requests are refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_header_auth: Option<RequestHeaderAuth>,
}

/// The requests that a rule is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct IngressMatch {
    /// Host name of the requests; a label in braces matches any label.
    pub hostname: String,
    /// Port of this host.
    pub port: u16,
}

/// The instance that answers the requests of a rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct IngressTarget {
    /// Name or id of the instance, or a label in braces of the host name.
    pub instance: String,
    /// Port of the instance.
    pub port: u16,
}

/// A header that requests must have exactly once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RequestHeaderAuth {
    /// Name of the header.
    pub header: String,
    /// The expected value. Readers that may not see secrets get stars instead.
    pub value: Secret,
}

impl Ingress {
    /// Converts a record to its wire form.
    #[must_use]
    pub fn of(object: &Object<Kind>) -> Self {
        let Object { meta, spec, status } = object;
        Self {
            id: meta.uid.to_string(),
            name: meta.name.to_string(),
            rules: spec.rules.iter().map(IngressRule::of).collect(),
            created_at: meta.created_at,
            tags: meta.tags.clone(),
            conditions: status.conditions.clone(),
        }
    }
}

impl IngressRule {
    fn of(rule: &Rule) -> Self {
        let Rule { hostname, port, target, auth } = rule;
        Self {
            matched: IngressMatch { hostname: hostname.to_string(), port: *port },
            target: IngressTarget { instance: target.instance.to_string(), port: target.port },
            tls: false,
            redirect_http: false,
            request_header_auth: auth.as_ref().map(|auth| {
                let HeaderAuth { header, value } = auth.clone();
                RequestHeaderAuth { header, value }
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn problems(rule: Value) -> Vec<(String, &'static str)> {
        let errors =
            IngressRequest::read(json!({ "name": "web", "rules": [rule] })).err().unwrap_or_default();
        let reported = errors.iter().map(|error| {
            (error.path.strip_prefix("rules[0].").unwrap_or(&error.path).to_owned(), error.code)
        });
        reported.collect()
    }

    fn with(key: &str, value: Value) -> Value {
        let mut rule = json!({ "match": { "hostname": "{instance}.test" },
            "target": { "instance": "{instance}", "port": 80 } });
        rule[key] = value;
        rule
    }

    fn auth(header: &str, length: usize) -> Value {
        with("request_header_auth", json!({ "header": header, "value": "v".repeat(length) }))
    }

    #[test]
    fn every_problem_of_a_rule_has_its_path_and_code() {
        let bad = |path: &str| vec![(path.to_owned(), INVALID)];
        for (rule, expected) in [
            (with("tls", json!(false)), vec![]),
            (with("redirect_http", json!(false)), vec![]),
            (auth("X-Origin-Secret", 32), vec![]),
            (auth("x", 256), vec![]),
            (with("tls", json!(true)), vec![("tls".to_owned(), UNSUPPORTED)]),
            (with("redirect_http", json!(true)), bad("redirect_http")),
            (with("match", json!({ "hostname": "a.test", "port": 0 })), {
                [bad("match.port"), bad("target.instance")].concat()
            }),
            (with("match", json!({ "hostname": "*.test" })), bad("match.hostname")),
            (with("match", json!({})), bad("match.hostname")),
            (with("match", json!(7)), [bad("match"), bad("match.hostname")].concat()),
            (with("target", json!({ "instance": "web" })), bad("target.port")),
            (with("target", json!({ "instance": "Web", "port": 80 })), bad("target.instance")),
            (with("target", json!({ "instance": "{app}", "port": 80 })), bad("target.instance")),
            (with("target", Value::Null), bad("target")),
            (with("path", json!("/x")), bad("path")),
            (auth("X-Origin-Secret", 31), bad("request_header_auth.value")),
            (auth("X-Origin-Secret", 257), bad("request_header_auth.value")),
            (auth("Authorization", 32), bad("request_header_auth.header")),
            (auth("proxy-anything", 32), bad("request_header_auth.header")),
            (auth("two words", 32), bad("request_header_auth.header")),
            (auth("", 32), bad("request_header_auth.header")),
            (with("request_header_auth", json!({})), {
                [bad("request_header_auth.header"), bad("request_header_auth.value")].concat()
            }),
        ] {
            assert_eq!(problems(rule.clone()), expected, "{rule}");
        }
        let many = |count: usize| {
            let rules = vec![with("tls", json!(false)); count];
            IngressRequest::read(json!({ "name": "web", "rules": rules }))
        };
        assert!(many(INGRESS_RULES_MAX).is_ok());
        assert!(many(INGRESS_RULES_MAX + 1).is_err());
        let none = IngressRequest::read(json!({ "tags": { "ü": "" } })).expect_err("nothing is right");
        let paths: Vec<&str> = none.iter().map(|error| error.path.as_str()).collect();
        assert_eq!(paths, ["name", "rules", "tags[ü]"]);
    }

    #[test]
    fn a_secret_is_in_the_answer_and_in_no_debug_output() {
        let request =
            IngressRequest::read(json!({ "name": "web", "rules": [auth("X-Key", 40)] })).expect("valid");
        let shown = IngressRule::of(&request.rules[0]);
        assert!(serde_json::to_string(&shown).expect("written").contains(&"v".repeat(40)));
        assert!(!format!("{request:?} {shown:?}").contains("vv"));
    }
}
