"""Manifests on stdin, held to the schemas of a version of Kubernetes.

manifests.py VERSION

Unknown fields are errors, one line each on stderr. Prints the objects as JSON;
those of other APIs have no schema here and are only printed.
"""
import json
import sys

import kubernetes_validate
import yaml


class Once(yaml.SafeLoader):
    """A key that is written twice is an error: the API server takes either."""


def mapping(loader, node):
    keys = [loader.construct_object(key) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.YAMLError(f"{key} is written twice")
    return loader.construct_mapping(node, deep=True)


Once.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)

objects = [o for o in yaml.load_all(sys.stdin, Loader=Once) if o]
good = True
for o in objects:
    try:
        kubernetes_validate.validate(o, sys.argv[1], strict=True)
    except kubernetes_validate.SchemaNotFoundError:
        if o["apiVersion"].split("/")[0] not in ("monitoring.coreos.com", "cert-manager.io"):
            print(f"no schema for {o['apiVersion']} {o['kind']}", file=sys.stderr)
            good = False
    except kubernetes_validate.ValidationError as error:
        print(f"{o['kind']} {o['metadata']['name']}: {error.message}", file=sys.stderr)
        good = False
print(json.dumps(objects))
sys.exit(0 if good else 1)
