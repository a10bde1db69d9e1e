"""Makes schema.json from the compiled OCSF schema: `extract.py 1.8.0.json > schema.json`.

Takes the classes that events become and the objects these hold, without what
is only to be read (descriptions, references, groups)."""
import json
import sys

CLASSES = """base_event process_activity kernel_activity network_activity dns_activity http_activity
api_activity detection_finding application_lifecycle entity_management event_log_actvity""".split()
OBJECTS = """actor analytic api application container device dns_answer dns_query evidences file
finding_info fingerprint firewall_rule http_header http_request http_response kernel managed_entity
message_context metadata network_connection_info network_endpoint network_traffic object os policy
process product request resource_details response service url user""".split()
# Attributes of other profiles are not attributes at all where the profile is not applied.
PROFILES = {"host", "security_control", "container", "ai_operation", "linux/linux_users"}


def attribute(a):
    out = {"type": a["type"], "requirement": a["requirement"]}
    for key in ("object_type", "is_array", "profiles", "sibling"):
        if a.get(key):
            out[key] = a[key]
    if "@deprecated" in a:
        out["deprecated"] = True
    if "enum" in a:
        out["enum"] = {k: v["caption"] for k, v in sorted(a["enum"].items())}
    return out


def item(i):
    out = {key: i[key] for key in ("uid", "caption", "category_uid", "profiles", "constraints") if i.get(key) is not None}
    out["attributes"] = {
        name: attribute(a)
        for name, a in sorted(i["attributes"].items())
        if not a.get("profiles") or PROFILES & set(a["profiles"])
    }
    return out


def lines(items):
    return "{\n" + ",\n".join(json.dumps(k) + ":" + json.dumps(v, separators=(",", ":")) for k, v in items) + "\n}"


schema = json.load(open(sys.argv[1]))
assert schema["version"] == "1.8.0"
types = schema["dictionary"]["types"]["attributes"]
keep = ("type", "regex", "range", "max_len", "values")
print('{"version":"1.8.0",')
print('"types":' + lines((n, {k: t[k] for k in keep if k in t}) for n, t in sorted(types.items())) + ",")
print('"classes":' + lines((n, item(schema["classes"][n])) for n in CLASSES) + ",")
print('"objects":' + lines((n, item(schema["objects"][n])) for n in OBJECTS) + "}")
