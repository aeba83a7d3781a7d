"""An OpenAPI document of what the official Python SDK sends and takes, on standard output.

The methods of the SDK's resources say method, path, parameters and the type of the answer; pydantic makes
schemas of those types. The argument is the daemon's own `/spec.json`: what is not in it is a route of later,
which alone may answer 501. Half of the bodies are tame, of words that the server of the test knows, so that
objects come into being; the others are whatever the SDK's types allow.
"""

import ast
import inspect
import json
import os
import re
import sys
import textwrap
import typing

from hypeman import Hypeman
from hypeman._resource import SyncAPIResource
from pydantic import TypeAdapter
from pydantic.errors import PydanticSchemaGenerationError
from typing_extensions import Required

IMAGE = os.environ["STEAD_TEST_IMAGE"]
VERBS = {"_get", "_post", "_put", "_patch", "_delete"}
# The contract's refusals. Methods that a path does not have are answered 405, which is checked apart.
REFUSALS = ["400", "401", "403", "404", "408", "409", "413", "415", "429"]

NAME = {"type": "string", "pattern": "^[a-z]{2,6}$"}
DURATION = {"enum": ["20m", "90m", "1h30m", "2h"]}
POLICY = {
    "type": "object", "additionalProperties": False,
    "properties": {"policy": {"enum": ["never", "on_failure", "always"]}, "backoff": DURATION,
                   "max_attempts": {"type": "integer", "minimum": 0, "maximum": 9}},
}
HEALTH = {
    "type": "object", "additionalProperties": False, "required": ["type", "tcp"],
    "properties": {"type": {"const": "tcp"}, "interval": DURATION, "tcp": {
        "type": "object", "additionalProperties": False, "required": ["port"],
        "properties": {"port": {"type": "integer", "minimum": 1, "maximum": 65535}}}},
}
COMPRESSION = {
    "type": "object", "additionalProperties": False, "required": ["enabled"],
    "properties": {"enabled": {"type": "boolean"}, "algorithm": {"enum": ["zstd", "lz4"]}},
}
RULE = {
    "type": "object", "additionalProperties": False, "required": ["match", "target"],
    "properties": {
        "match": {"type": "object", "additionalProperties": False, "required": ["hostname", "port"],
                  "properties": {"hostname": {"type": "string", "pattern": "^[a-z]{1,4}[.]test$"},
                                 "port": {"type": "integer", "minimum": 1, "maximum": 65535}}},
        "target": {"type": "object", "additionalProperties": False, "required": ["instance", "port"],
                   "properties": {"instance": {"enum": ["web", "off"]},
                                  "port": {"type": "integer", "minimum": 1, "maximum": 65535}}}},
}
MOUNT = {
    "type": "object", "additionalProperties": False, "required": ["volume_id", "mount_path"],
    "properties": {"volume_id": {"const": "data"}, "mount_path": {"pattern": "^/srv/[a-z]{1,3}$", "type": "string"},
                   "readonly": {"type": "boolean"}},
}
# Fields by their name, in a body; what is not here is left out of a tame one.
TAME = {
    "name": NAME, "image": {"const": IMAGE}, "size": {"enum": ["256MB", "512MB"]},
    "overlay_size": {"enum": ["256MB", "1GB"]}, "vcpus": {"enum": [1, 2]}, "size_gb": {"enum": [1, 2]},
    "kind": {"enum": ["Standby", "Stopped"]}, "target_state": {"enum": ["Running", "Stopped"]},
    "from_running": {"type": "boolean"}, "restart_policy": POLICY, "health_check": HEALTH, "ttl": DURATION,
    "interval": DURATION, "retention": {"const": {"max_count": 2}}, "compression": COMPRESSION,
    "mount_path": {"type": "string", "pattern": "^/mnt/[a-z]{1,3}$"}, "readonly": {"type": "boolean"},
    "rules": {"type": "array", "minItems": 1, "maxItems": 2, "items": RULE}, "volumes": {"type": "array", "items": MOUNT, "maxItems": 2},
    "target": {"enum": ["registry.test/other:v1", "registry.test/other:v2"]}, "cmd": {"const": ["serve"]},
    "tags": {"enum": [{}, {"team": "a"}, {"team": "b", "env": "prod"}]},
}
# What the test has made before, by the resource of the path; whatever else a client may write, too.
KNOWN = {"instances": ["web", "off"], "volumes": ["data"], "images": [IMAGE], "ingresses": ["front"],
         "snapshots": os.environ.get("STEAD_TEST_SNAPSHOT", "").split()}


EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}


def nullable(schema):
    """Optional fields may be null, which says what their absence says: more than the SDK's types have."""
    if isinstance(schema, list):
        return [nullable(part) for part in schema]
    if not isinstance(schema, dict) or "const" in schema or "enum" in schema:
        return schema
    made = {key: nullable(part) for key, part in schema.items()}
    if isinstance(made.get("properties"), dict):
        required = made.get("required", [])
        made["properties"] = {name: part if name in required else {"anyOf": [part, {"type": "null"}]}
                              for name, part in made["properties"].items()}
    return made


class Document:
    def __init__(self, served):
        self.served, self.paths, self.schemas = served, {}, {}

    def schema(self, kind, prefix, is_sent=False):
        """The JSON schema of one of the SDK's types; its parts become components of their own."""
        prefix += ".sent" if is_sent else ""
        template = f"#/components/schemas/{prefix}.{{model}}"
        made = TypeAdapter(kind).json_schema(ref_template=template)
        for name, part in made.pop("$defs", {}).items():
            self.schemas[f"{prefix}.{name}"] = nullable(part) if is_sent else part
        return made

    def fields(self, kind, names, prefix):
        """Schemas of the fields of a dictionary that the SDK sends, and which of them it must have."""
        found, required = {}, []
        for name, hint in typing.get_type_hints(kind, include_extras=True).items():
            if names is not None and name not in names:
                continue
            is_required = typing.get_origin(hint) is Required
            hint = typing.get_args(hint)[0] if is_required else hint
            for mark in getattr(hint, "__metadata__", ()):
                name = getattr(mark, "alias", None) or name
            required += [name] if is_required else []
            try:
                found[name] = self.schema(hint, prefix, is_sent=True)
            except PydanticSchemaGenerationError:
                found[name] = {"type": "string", "format": "binary"}
        return found, required

    def body(self, kind, names, prefix):
        found, required = self.fields(kind, names, prefix)
        if prefix.startswith("instances.update") and "env" in found:
            # An addition of the server: null removes a variable.
            found["env"] = {"type": "object", "additionalProperties": {"type": ["string", "null"]}}
        wild = nullable({"type": "object", "properties": found, "required": required})
        tame = {name: TAME[name] for name in found if name in TAME}
        if not set(required) <= set(tame):
            return wild
        if "snapshots" in prefix and "create" in prefix:
            required = required + ["name"]
        tame = {"type": "object", "properties": tame, "required": required, "additionalProperties": False}
        return {"anyOf": [nullable(tame), wild]}

    def add(self, operation, call):
        method, path = call.method, re.sub(r"\{(\w+)\}", lambda found: "{" + found[1] + "}", call.path)
        parameters = [self.of_path(path, name, method) for name in re.findall(r"\{(\w+)\}", path)]
        if call.query:
            found, required = self.fields(call.query[0], call.query[1], operation)
            for name, schema in found.items():
                deep = {}
                if name == "tags":
                    # Whatever stands there is a text in a query.
                    schema = {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean", "null"]}}
                    deep = {"style": "deepObject", "explode": True}
                parameters.append({"name": name, "in": "query", "required": name in required, "schema": schema, **deep})
        answers = {status: self.refusal() for status in REFUSALS}
        is_served = (method, re.sub(r"\{\w+\}", "{}", path)) in self.served
        if not is_served:
            answers["501"] = self.refusal()
        if call.answer is type(None):
            answers["204"] = {"description": "Done"}
        else:
            content = "text/event-stream" if call.streams else "application/json"
            schema = EVENT if call.streams else self.schema(call.answer, operation)
            answers["2XX"] = {"description": "Success", "content": {content: {"schema": schema}}}
        entry = {"operationId": operation, "tags": [operation.split(".")[0]], "parameters": parameters, "responses": answers}
        if path == "/health":
            entry["security"] = []
        if call.body or call.bytes:
            content, schema = "application/json", None
            if call.bytes:
                content, schema = "application/gzip", {"type": "string", "format": "binary"}
            else:
                content = "multipart/form-data" if call.files else content
                schema = self.body(*call.body, operation)
            forms = schema.get("anyOf", [schema])
            needed = all(form.get("required") or "properties" not in form for form in forms)
            if not needed:
                schema = {"anyOf": [schema, {"type": "null"}]}
            entry["requestBody"] = {"required": needed, "content": {content: {"schema": schema}}}
        self.paths.setdefault(path, {})[method] = entry

    def of_path(self, path, name, method):
        kind = path.split("/")[1]
        if name.startswith(("volume", "snapshot")):
            kind = name.split("_")[0] + "s"
        known = ["spare"] if method == "delete" and path.count("/") == 2 else KNOWN.get(kind) or ["none"]
        schema = {"anyOf": [{"enum": known}, {"type": "string", "minLength": 1}]}
        return {"name": name, "in": "path", "required": True, "schema": schema}

    @staticmethod
    def refusal():
        schema = {"$ref": "#/components/schemas/Error"}
        return {"description": "Refused", "content": {"application/json": {"schema": schema}}}

    def add_own(self):
        """Methods beyond the SDK's on its paths."""
        by_form = {re.sub(r"\{\w+\}", "{}", path): path for path in self.paths}
        for method, form in sorted(self.served):
            path = by_form.get(form)
            if path is None or method in self.paths[path]:
                continue
            answers = {status: self.refusal() for status in REFUSALS}
            answers["2XX"] = {"description": "Success", "content": {"application/json": {"schema": {"type": "object"}}}}
            entry = {"operationId": f"own.{method}{form}", "responses": answers,
                     "parameters": [self.of_path(path, name, method) for name in re.findall(r"\{(\w+)\}", path)]}
            if method in ("post", "put", "patch"):
                entry["requestBody"] = {"content": {"application/json": {"schema": {"type": "object"}}}}
            self.paths[path][method] = entry

    def whole(self):
        part = {"type": "object", "required": ["code", "message"],
                "properties": {"code": {"type": "string"}, "message": {"type": "string"}}}
        self.schemas["Error"] = {"type": "object", "required": ["code", "message"], "properties": {
            "code": {"type": "string", "minLength": 1}, "message": {"type": "string", "minLength": 1},
            "details": {"type": "array", "items": part}, "inner_error": part}}
        return {
            "openapi": "3.1.0", "info": {"title": "What the SDK speaks", "version": "0.28.0"}, "paths": self.paths,
            "security": [{"bearer": []}],
            "components": {"schemas": self.schemas,
                           "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}},
        }


class Call:
    """The one call of the client's transport in a method of a resource."""

    def __init__(self, method):
        self.names = vars(sys.modules[method.__module__])
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
        call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Attribute) and node.func.attr in VERBS)
        self.method = call.func.attr[1:]
        path = call.args[0]
        self.path = (path.args[0] if isinstance(path, ast.Call) else path).value
        keywords = {word.arg: word.value for word in call.keywords}
        options = {word.arg: word.value for word in keywords["options"].keywords}
        self.body, self.query = self.typed(keywords.get("body")), self.typed(options.get("query"))
        self.bytes, self.files = "content" in keywords, "files" in keywords
        self.streams = "stream" in keywords
        self.answer = self.value(keywords["cast_to"])

    def value(self, node):
        return eval(compile(ast.Expression(node), "<sdk>", "eval"), self.names)

    def typed(self, node):
        if node is None:
            return None
        fields, kind = node.args
        names = [key.value for key in fields.keys] if isinstance(fields, ast.Dict) else None
        return self.value(kind), names


def resources(client, prefix=""):
    for name in sorted(dir(type(client))):
        if name.startswith(("_", "with_")):
            continue
        found = getattr(client, name, None)
        if isinstance(found, SyncAPIResource):
            yield f"{prefix}{name}.", found
            yield from resources(found, f"{prefix}{name}.")


def main():
    with open(sys.argv[1], encoding="utf-8") as file:
        paths = json.load(file)["paths"]
    # A route of later has no response that is a success.
    served = {(method, re.sub(r"\{\w+\}", "{}", path)) for path, methods in paths.items()
              for method, operation in methods.items()
              if any(status < "400" for status in operation["responses"])}
    document = Document(served)
    for prefix, resource in resources(Hypeman(api_key="none", base_url="http://localhost")):
        for name, method in inspect.getmembers(type(resource), inspect.isfunction):
            source = inspect.getsource(method)
            if not name.startswith("_") and any(f"self.{verb}(" in source for verb in VERBS):
                document.add(prefix + name, Call(method))
    document.add_own()
    json.dump(document.whole(), sys.stdout, indent=1)


main()
