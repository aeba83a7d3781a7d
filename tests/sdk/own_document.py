"""The daemon's own OpenAPI document, with names of objects that exist among the values of path parameters.

The argument is the daemon's `/spec.json`; the document is on standard output. Responses without an end of their
own, and the backup, which the server of the test cannot make, are left out.
"""

import json
import os
import sys

IMAGE = os.environ["STEAD_TEST_IMAGE"]
# Objects that the test has made, by the group of the operation or by the parameter.
KNOWN = {"instances": ["web", "off"], "volumes": ["data"], "volume": ["data"], "images": [IMAGE],
         "ingresses": ["front"], "snapshots": [os.environ["STEAD_TEST_SNAPSHOT"]],
         "snapshot": [os.environ["STEAD_TEST_SNAPSHOT"]]}
LEFT_OUT = ["/backup"]
# A request must not wait: neither for a state for minutes, nor for an image that no registry has.
QUICK = {"enum": ["20ms", "0.02s"]}


# Verbs whose responses wait for the host, for up to 55 s where it has no room. They are sent to an object that does
# not exist, since bodies are read first; the requests of the SDK's types name objects that exist.
VERBS = ("/start", "/stop", "/standby", "/restore", "/fork", "/snapshots")


def name_objects(method, path, operation):
    group = path.split("/")[1]
    for parameter in operation["parameters"]:
        if parameter["in"] != "path":
            continue
        known = KNOWN.get(parameter["name"]) or KNOWN.get(group) or ["none"]
        if method == "delete" and path.count("/") == 2:
            known = ["spare"]
        parameter["schema"] = {"anyOf": [{"enum": known}, parameter["schema"]]}


def without_object(path, methods):
    if "{" not in path or not path.endswith(VERBS):
        return path
    for operation in methods.values():
        operation["parameters"] = [one for one in operation["parameters"] if one["in"] != "path"]
    return path.replace("{id}", "none").replace("{snapshot}", "none")


def shorten(document):
    wait = document["paths"]["/instances/{id}/wait"]["get"]
    for parameter in wait["parameters"]:
        if parameter["name"] == "timeout":
            parameter["schema"] = QUICK
    schemas = document["components"]["schemas"]
    schemas["InstanceCreate"]["properties"]["image"] = {"enum": [IMAGE]}


def loosen_tags(operation):
    """Whatever stands there is a text in a query."""
    for parameter in operation["parameters"]:
        if parameter["name"] == "tags":
            parameter["schema"]["additionalProperties"]["type"] = ["string", "number", "boolean", "null"]


def main():
    with open(sys.argv[1], encoding="utf-8") as file:
        document = json.load(file)
    for path in LEFT_OUT:
        del document["paths"][path]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            name_objects(method, path, operation)
            loosen_tags(operation)
    shorten(document)
    document["paths"] = {without_object(path, methods): methods for path, methods in document["paths"].items()}
    json.dump(document, sys.stdout)


main()
