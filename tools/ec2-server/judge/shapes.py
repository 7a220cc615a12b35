"""What botocore's service models say of requests and answers."""

import json
import re
import xml.etree.ElementTree as ElementTree

import botocore.session
from botocore.validate import ParamValidator

SESSION = botocore.session.get_session()


def name_of(member, shape):
    """A member's name in an EC2 request."""
    serialization = shape.serialization
    if "queryName" in serialization:
        return serialization["queryName"]
    name = serialization.get("name")
    return name[0].upper() + name[1:] if name else member


class Wrong(Exception):
    pass


def scalar(shape, value, path):
    kind = shape.type_name
    if kind in ("integer", "long"):
        if not value.lstrip("-").isdigit():
            raise Wrong(f"{path}: {value!r} is no {kind}")
        return int(value)
    if kind == "boolean":
        if value not in ("true", "false"):
            raise Wrong(f"{path}: {value!r} is no boolean")
        return value == "true"
    if kind == "string":
        if shape.enum and value not in shape.enum:
            raise Wrong(f"{path}: {value!r} is none of {', '.join(shape.enum)}")
        return value
    if kind == "blob":
        return value.encode()
    if kind in ("double", "float"):
        return float(value)
    raise Wrong(f"{path}: a {kind} cannot be judged")


def build(shape, fields, path):
    """A value of the shape, from fields by their path within it. What is left in `fields` belongs to nothing."""
    kind = shape.type_name
    if kind == "structure":
        value = {}
        for member, inner in shape.members.items():
            name = name_of(member, inner)
            mine = {p[len(name):].lstrip("."): fields.pop(p) for p in list(fields) if p == name or p.startswith(name + ".")}
            if mine:
                value[member] = build(inner, mine, f"{path}.{name}" if path else name)
                if mine:
                    raise Wrong(f"{path}.{name}: {', '.join(mine)} is unknown")
        return value
    if kind == "list":
        items = {}
        for field in list(fields):
            number, _, rest = field.partition(".")
            if not number.isdigit():
                raise Wrong(f"{path}: {field!r} is no number")
            items.setdefault(int(number), {})[rest] = fields.pop(field)
        if sorted(items) != list(range(1, len(items) + 1)):
            raise Wrong(f"{path} is numbered {sorted(items)}")
        value = []
        for number in sorted(items):
            value.append(build(shape.member, items[number], f"{path}.{number}"))
            if items[number]:
                raise Wrong(f"{path}.{number}: {', '.join(items[number])} is unknown")
        return value
    if list(fields) != [""]:
        raise Wrong(f"{path}: {', '.join(fields)} under a {kind}")
    return scalar(shape, fields.pop(""), path)


def members(shape, params):
    """The members of a request to EBS: text, and JSON where they are more than that."""
    value = {}
    for name, text in params.items():
        if name not in shape.members:
            raise Wrong(f"{name} is unknown")
        inner = shape.members[name]
        if inner.type_name in ("list", "structure", "map"):
            value[name] = json.loads(text)
            continue
        value[name] = scalar(inner, text, name)
        pattern, longest = inner.metadata.get("pattern"), inner.metadata.get("max")
        if isinstance(value[name], str):
            if pattern and not re.search(pattern, value[name]):
                raise Wrong(f"{name}: {text!r} is not of the form {pattern}")
            if longest and len(text) > longest:
                raise Wrong(f"{name} is longer than {longest}")
        elif longest and value[name] > longest:
            raise Wrong(f"{name}: {text} is more than {longest}")
    return value


def judge(service, action, params):
    """The call's parameters as botocore takes them. Raises what is wrong with them."""
    model = SESSION.get_service_model(service)
    if action not in model.operation_names:
        raise Wrong(f"{service} has no {action}")
    shape = model.operation_model(action).input_shape
    if service == "ebs":
        value = members(shape, params)
        if action == "PutSnapshotBlock":
            # Recorded by its digest alone.
            value["BlockData"] = b""
    elif service == "ssm":
        value = {}
        for name, text in params.items():
            if name not in shape.members:
                raise Wrong(f"{name} is unknown")
            inner = shape.members[name]
            value[name] = text if inner.type_name == "string" else json.loads(text)
    else:
        fields = {name: text for name, text in params.items() if name not in ("Action", "Version")}
        value = build(shape, fields, "") if shape else {}
        if fields:
            raise Wrong(f"{', '.join(sorted(fields))} is unknown")
    report = ParamValidator().validate(value, shape) if shape else None
    if report and report.has_errors():
        raise Wrong(report.generate_report())
    return value


def unknown_elements(shape, element, path):
    """Elements of an answer that the model does not know."""
    if shape is None:
        # An answer without a shape says `return` at most.
        known = ("requestId", "return")
        return [f"{path}/{local(child)}" for child in element if local(child) not in known]
    if shape.type_name == "structure":
        names = {inner.serialization.get("name", member): inner for member, inner in shape.members.items()}
        found = []
        for child in element:
            name = local(child)
            if name in names:
                found += unknown_elements(names[name], child, f"{path}/{name}")
            elif not (path.count("/") == 0 and name in ("requestId", "return")):
                found.append(f"{path}/{name}")
        return found
    if shape.type_name == "list":
        item = shape.member.serialization.get("name", "item")
        wrong = [f"{path}/{local(child)}" for child in element if local(child) != item]
        return wrong + [name for child in element for name in unknown_elements(shape.member, child, f"{path}/{item}")]
    text = element.text or ""
    if shape.type_name == "boolean" and text not in ("true", "false"):
        return [f"{path} = {text!r}, which is no boolean"]
    if shape.type_name in ("integer", "long") and not text.lstrip("-").isdigit():
        return [f"{path} = {text!r}, which is no number"]
    if shape.type_name == "string" and shape.enum and text not in shape.enum:
        return [f"{path} = {text!r}, which is none of {', '.join(shape.enum)}"]
    return []


def unknown_members(shape, value, path):
    """Members of an answer in JSON that the model does not know, or knows as something else."""
    kinds = {"string": str, "integer": int, "long": int, "boolean": bool, "timestamp": (int, float)}
    if shape.type_name == "structure":
        found = [f"{path}/{name}" for name in value if name not in shape.members]
        for name, inner in value.items():
            if name in shape.members:
                found += unknown_members(shape.members[name], inner, f"{path}/{name}")
        return found
    if shape.type_name == "list":
        return [wrong for inner in value for wrong in unknown_members(shape.member, inner, path)]
    if not isinstance(value, kinds[shape.type_name]):
        return [f"{path} = {value!r}, which is no {shape.type_name}"]
    return [f"{path} = {value!r}"] if getattr(shape, "enum", None) and value not in shape.enum else []


def judge_json(service, action, status, headers, body):
    """An answer of EBS: its status, its members in the body and in the headers."""
    model = SESSION.get_service_model(service).operation_model(action)
    if status != model.http.get("responseCode", 200):
        raise Wrong(f"{action} is answered with {status}")
    if model.has_streaming_output or not body:
        names = {inner.serialization.get("name", "").lower() for inner in model.output_shape.members.values()}
        missing = names - {""} - {name.lower() for name in headers}
        if missing:
            raise Wrong(f"the answer of {action} lacks {', '.join(sorted(missing))}")
        return
    found = unknown_members(model.output_shape, json.loads(body), action)
    if found:
        raise Wrong("the answer has " + "; ".join(found))


def local(element):
    return element.tag.rpartition("}")[2]


def judge_answer(action, body):
    model = SESSION.get_service_model("ec2").operation_model(action)
    found = unknown_elements(model.output_shape, ElementTree.fromstring(body), action)
    if found:
        raise Wrong("the answer has " + "; ".join(found))
