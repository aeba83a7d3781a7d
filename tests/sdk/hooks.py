"""What the generated requests may not ask for: to wait. They are made one after another."""

import schemathesis


@schemathesis.serializer("application/gzip")
def bytes_as_they_are(context, value):
    return getattr(value, "data", value)


@schemathesis.hook
def before_call(context, case, kwargs):
    if case.path.endswith(("/logs", "/egress/log", "/events")) and (case.query or {}).get("follow"):
        case.query = {**case.query, "follow": "false"}
    if (case.query or {}).get("watch"):
        case.query = {**case.query, "watch": "false"}
    if case.path == "/instances/{id}/wait" and not (case.query or {}).get("timeout"):
        case.query = {**(case.query or {}), "timeout": "20ms"}
