"""Make kubernetes_schemas.json, which tests/project/test_cluster_files.py validates the manifests against.

    git clone --depth 1 --branch v1.7.0 https://github.com/ray-project/kuberay
    pip install kubernetes-validate==1.37.0
    python tests/support/kubernetes_schemas.py kuberay

From Kubernetes' own definitions (as kubernetes-validate bundles them) and KubeRay's custom resource definitions, both
under the Apache licence 2.0, it keeps structure only: names, types, what is required and which values there are. In
KubeRay's, pods' templates and other parts that Kubernetes defines are references to Kubernetes' definitions.
"""

from __future__ import annotations

import importlib.resources
import json
import sys
from pathlib import Path
from typing import Any

import yaml

KUBERNETES = "v1.34.0"
KUBERAY = "v1.7.0"
OUT = Path(__file__).with_name("kubernetes_schemas.json")
KINDS = {
    "PersistentVolumeClaim": "io.k8s.api.core.v1.PersistentVolumeClaim",
    "NetworkPolicy": "io.k8s.api.networking.v1.NetworkPolicy",
}
OF_KUBERNETES = {
    "template": "io.k8s.api.core.v1.PodTemplateSpec",
    "submitterPodTemplate": "io.k8s.api.core.v1.PodTemplateSpec",
    "headService": "io.k8s.api.core.v1.Service",
    "securityContext": "io.k8s.api.core.v1.SecurityContext",
    "resources": "io.k8s.api.core.v1.ResourceRequirements",
    "metadata": "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta",
}
"""Names of objects in KubeRay's definitions, and what Kubernetes calls their type."""
KEPT = ("type", "required", "enum", "minimum", "maximum", "pattern", "items", "additionalProperties", "oneOf", "anyOf")


def reduce(schema: Any, known: dict[str, Any] | None = None) -> Any:
    """The structure of `schema`, in which an object has no other fields than the named ones.

    With `known`, definitions of Kubernetes, the objects that they define become references to them.
    """
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return {"$ref": "#/definitions/" + schema["$ref"].rpartition("/")[2]}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    kept: dict[str, Any] = {}
    for name in KEPT:
        if name in schema:
            value = schema[name]
            kept[name] = [reduce(one, known) for one in value] if name in ("oneOf", "anyOf") else reduce(value, known)
    if "properties" in schema:
        kept["properties"] = {name: _field(name, field, known) for name, field in schema["properties"].items()}
        if "x-kubernetes-preserve-unknown-fields" not in schema:
            kept.setdefault("additionalProperties", False)
    return kept


def _field(name: str, field: Any, known: dict[str, Any] | None) -> Any:
    """A field of an object: a reference where it is Kubernetes', else its structure."""
    reference = OF_KUBERNETES.get(name)
    if known is None or reference is None or "properties" not in field or "additionalProperties" in field:
        return reduce(field, known)
    if name != "metadata" and not set(field["properties"]) <= set(known[reference]["properties"]):
        raise ValueError(
            f"{name} is not {reference}: {sorted(set(field['properties']) - set(known[reference]['properties']))}"
        )
    return {"$ref": f"#/definitions/{reference}"}


def closure(names: set[str], definitions: dict[str, Any]) -> dict[str, Any]:
    """The definitions of `names`, and of all that they refer to."""
    found: dict[str, Any] = {}
    waiting = set(names)
    while waiting:
        name = waiting.pop()
        found[name] = reduce(definitions[name])
        text = json.dumps(found[name])
        mentioned = {part.split('"')[0] for part in text.split("#/definitions/")[1:]}
        waiting |= mentioned - set(found)
    return found


def main(kuberay: Path) -> None:
    """Writes the schemas of all kinds that we use."""
    folder = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"{KUBERNETES}-local-strict"
    definitions = json.loads((folder / "_definitions.json").read_text())["$defs"]
    kinds: dict[str, Any] = {kind: {"$ref": f"#/definitions/{name}"} for kind, name in KINDS.items()}
    for kind, file in (("RayCluster", "rayclusters"), ("RayJob", "rayjobs")):
        resource = yaml.safe_load((kuberay / "helm-chart/kuberay-operator/crds" / f"ray.io_{file}.yaml").read_text())
        version = next(one for one in resource["spec"]["versions"] if one["name"] == "v1")
        schema = version["schema"]["openAPIV3Schema"]
        del schema["properties"]["status"]
        kinds[kind] = reduce(schema, definitions)
        kinds[kind]["properties"] |= {"apiVersion": {"enum": ["ray.io/v1"]}, "kind": {"enum": [kind]}}
        kinds[kind]["properties"]["metadata"] = {"$ref": f"#/definitions/{OF_KUBERNETES['metadata']}"}
        kinds[kind]["required"] = ["apiVersion", "kind", "metadata", "spec"]
    needed = {part.split('"')[0] for part in json.dumps(kinds).split("#/definitions/")[1:]}
    written = {
        "source": {
            "kubernetes": KUBERNETES,
            "kuberay": KUBERAY,
            "licence": "Apache-2.0",
            "made by": "tests/support/kubernetes_schemas.py",
        },
        "kinds": kinds,
        "definitions": closure(needed, definitions),
    }
    OUT.write_text(json.dumps(written, separators=(",", ":"), sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
