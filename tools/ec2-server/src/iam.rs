//! Checks permissions, by a list of denied actions and by an IAM policy.

use crate::filter::matches;
use crate::options::ServerOptions;
use crate::refusal::{Refusal, Result, refuse};
use crate::world::Tags;
use serde_json::Value;

/// A resource that a call works on.
#[derive(Debug, Clone, Copy)]
pub enum Target<'a> {
    /// A resource that exists.
    Is { id: &'a str, tags: &'a Tags },
    /// A resource that the call creates, with its tags.
    Made { kind: &'a str, tags: &'a Tags },
    /// A resource with this ARN.
    Named(&'a str),
}

impl<'a> Target<'a> {
    pub fn new(id: &'a str, tags: &'a Tags) -> Self {
        Self::Is { id, tags }
    }

    pub fn made(kind: &'a str, tags: &'a Tags) -> Self {
        Self::Made { kind, tags }
    }

    fn arn(&self, options: &ServerOptions) -> String {
        let (kind, id) = match self {
            Self::Named(arn) => return (*arn).to_owned(),
            Self::Made { kind, .. } => (*kind, "*"),
            Self::Is { id, .. } => {
                let kind = match id.split_once('-').map_or("", |(prefix, _)| prefix) {
                    "vol" => "volume",
                    "snap" => "snapshot",
                    "ami" => "image",
                    _ => "instance",
                };
                (kind, *id)
            }
        };
        // The ARNs of images and snapshots contain no account.
        let account = if matches!(kind, "image" | "snapshot") { "" } else { &options.account };
        format!("arn:aws:ec2:{}:{account}:{kind}/{id}", options.region)
    }
}

fn unauthorized(service: &str) -> Refusal {
    if service == "ec2" {
        let text =
            "You are not authorized to perform this operation. Encoded authorization failure message: AAAA";
        refuse("UnauthorizedOperation", text)
    } else {
        refuse("AccessDeniedException", "User is not authorized to perform this operation")
    }
}

/// Fails if an action (of EC2, or `ssm:GetParameter`) is not permitted for all targets.
pub fn permitted(options: &ServerOptions, action: &str, targets: &[Target<'_>]) -> Result<()> {
    let (service, name) = action.split_once(':').unwrap_or(("ec2", action));
    let mut asked = vec![(name, targets.to_vec(), None)];
    for target in targets {
        // The tags of StartSnapshot need no permission for CreateTags.
        if let Target::Made { tags, .. } = target
            && service == "ec2"
            && !tags.is_empty()
            && name != "CreateTags"
        {
            asked.push(("CreateTags", vec![*target], Some(name)));
        }
    }
    for (name, targets, create) in asked {
        // CreateTags is an action of EC2, even if another service creates the resource.
        let service = if create.is_some() { "ec2" } else { service };
        let denied = options.denied.contains(name) || options.denied.contains(&format!("{service}:{name}"));
        let by_policy = |policy| allows(policy, options, &format!("{service}:{name}"), &targets, create);
        if denied || !options.policy.as_ref().is_none_or(by_policy) {
            return Err(unauthorized(service));
        }
    }
    Ok(())
}

/// The values for the condition keys of a policy.
struct Context<'a> {
    request: Vec<(&'a String, &'a String)>,
    resource: Option<&'a Tags>,
    create: Option<&'a str>,
    region: &'a str,
}

impl Context<'_> {
    /// Returns `None` if the context does not have the key.
    fn get(&self, key: &str) -> Option<Vec<String>> {
        let one = |value: &str| Some(vec![value.to_owned()]);
        if let Some(tag) = key.strip_prefix("aws:RequestTag/") {
            return self.request.iter().find(|(k, _)| *k == tag).and_then(|(_, v)| one(v));
        }
        if let Some(tag) = key.strip_prefix("aws:ResourceTag/").or(key.strip_prefix("ec2:ResourceTag/")) {
            return self.resource?.get(tag).and_then(|value| one(value));
        }
        match key {
            "aws:TagKeys" if self.request.is_empty() => None,
            "aws:TagKeys" => Some(self.request.iter().map(|(k, _)| (*k).clone()).collect()),
            "ec2:CreateAction" => one(self.create?),
            "aws:RequestedRegion" | "ec2:Region" => one(self.region),
            _ => None,
        }
    }
}

fn allows(
    policy: &Value,
    options: &ServerOptions,
    action: &str,
    targets: &[Target<'_>],
    create: Option<&str>,
) -> bool {
    let request =
        targets.iter().filter_map(|t| if let Target::Made { tags, .. } = t { Some(*tags) } else { None });
    let mut context =
        Context { request: request.flatten().collect(), resource: None, create, region: &options.region };
    let decide = |arn: &str, context: &Context<'_>| {
        let mut allowed = false;
        for statement in list(&policy["Statement"]) {
            if applies(statement, action, arn, context) {
                match statement["Effect"].as_str() {
                    Some("Allow") => allowed = true,
                    _ => return false,
                }
            }
        }
        allowed
    };
    if targets.is_empty() {
        // An action without resources is permitted only by the resource `*`.
        return decide("*", &context);
    }
    targets.iter().all(|target| {
        context.resource = if let Target::Is { tags, .. } = target { Some(*tags) } else { None };
        decide(&target.arn(options), &context)
    })
}

fn list(value: &Value) -> &[Value] {
    match value {
        Value::Array(values) => values,
        Value::Null => &[],
        one => std::slice::from_ref(one),
    }
}

fn strings(value: &Value) -> impl Iterator<Item = String> + '_ {
    list(value).iter().map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned))
}

fn applies(statement: &Value, action: &str, arn: &str, context: &Context<'_>) -> bool {
    let action_fits = strings(&statement["Action"])
        .any(|pattern| matches(&pattern.to_ascii_lowercase(), &action.to_ascii_lowercase()));
    let arn_fits = strings(&statement["Resource"]).any(|pattern| matches(&pattern, arn));
    let conditions = statement["Condition"].as_object();
    action_fits
        && arn_fits
        && conditions.is_none_or(|all| {
            all.iter().all(|(operator, keys)| {
                keys.as_object()
                    .is_some_and(|keys| keys.iter().all(|(key, value)| holds(operator, key, value, context)))
            })
        })
}

fn holds(operator: &str, key: &str, wanted: &Value, context: &Context<'_>) -> bool {
    let is = context.get(key);
    let wanted: Vec<String> = strings(wanted).collect();
    if operator == "Null" {
        return wanted.iter().all(|w| (w == "true") == is.is_none());
    }
    let (quantifier, operator) = operator.split_once(':').map_or(("", operator), |(q, o)| (q, o));
    let (operator, if_exists) = operator.strip_suffix("IfExists").map_or((operator, false), |o| (o, true));
    let fits = |value: &String| match operator {
        "StringEquals" => wanted.contains(value),
        "StringNotEquals" => !wanted.contains(value),
        "StringLike" => wanted.iter().any(|pattern| matches(pattern, value)),
        "StringNotLike" => !wanted.iter().any(|pattern| matches(pattern, value)),
        other => {
            eprintln!("oven-ec2-server: a policy's operator is not known: {other}");
            false
        }
    };
    match is {
        None => if_exists || quantifier == "ForAllValues" || operator.starts_with("StringNot"),
        Some(values) if quantifier == "ForAnyValue" => values.iter().any(fits),
        Some(values) => values.iter().all(fits),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn tags(pairs: &[(&str, &str)]) -> Tags {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn a_policy_is_as_strict_as_it_reads() {
        let policy = json!({"Version": "2012-10-17", "Statement": [
            {"Effect": "Allow", "Action": "ec2:Describe*", "Resource": "*"},
            {"Effect": "Allow", "Action": "ec2:CreateVolume", "Resource": "arn:aws:ec2:*:*:volume/*",
             "Condition": {"Null": {"aws:RequestTag/oven:run": "false"}}},
            {"Effect": "Allow", "Action": "ec2:CreateVolume", "Resource": "arn:aws:ec2:*::snapshot/*"},
            {"Effect": "Allow", "Action": "ec2:CreateTags", "Resource": "*",
             "Condition": {"StringEquals": {"ec2:CreateAction": ["CreateVolume"]}}},
            {"Effect": "Allow", "Action": ["ec2:DeleteVolume"], "Resource": "*",
             "Condition": {"StringLike": {"ec2:ResourceTag/oven:run": "*"}}},
            {"Effect": "Deny", "Action": "ec2:DeleteVolume", "Resource": "arn:aws:ec2:*:*:volume/vol-1"}]});
        let options = ServerOptions { policy: Some(policy), ..ServerOptions::default() };
        let (none, ours) = (Tags::new(), tags(&[("oven:run", "r")]));
        let may = |action: &str, targets: &[Target<'_>]| permitted(&options, action, targets).is_ok();
        assert!(may("DescribeImages", &[]) && !may("RegisterImage", &[]));
        let snapshot = Target::new("snap-1", &none);
        assert!(may("CreateVolume", &[Target::made("volume", &ours), snapshot]));
        assert!(!may("CreateVolume", &[Target::made("volume", &none), snapshot]));
        assert!(!may("CreateVolume", &[Target::made("volume", &ours), Target::new("i-1", &none)]));
        assert!(!may("CreateTags", &[Target::new("vol-2", &ours)]));
        assert!(may("DeleteVolume", &[Target::new("vol-2", &ours)]));
        assert!(!may("DeleteVolume", &[Target::new("vol-2", &none)]));
        assert!(!may("DeleteVolume", &[Target::new("vol-1", &ours)]));
        let denied = ServerOptions { denied: ["CreateTags".to_owned()].into(), ..ServerOptions::default() };
        let refused = permitted(&denied, "CreateVolume", &[Target::made("volume", &ours)]).unwrap_err();
        assert_eq!((refused.status, refused.code.as_str()), (403, "UnauthorizedOperation"));
        permitted(&denied, "CreateVolume", &[Target::made("volume", &none)]).unwrap();
    }

    #[test]
    fn operators() {
        let tags = tags(&[("a", "1")]);
        let context = Context { request: tags.iter().collect(), resource: None, create: None, region: "r" };
        for (operator, key, wanted, expected) in [
            ("StringEquals", "aws:RequestTag/a", json!(["1", "2"]), true),
            ("StringEquals", "aws:RequestTag/b", json!("1"), false),
            ("StringEqualsIfExists", "aws:RequestTag/b", json!("1"), true),
            ("StringNotEquals", "aws:RequestTag/a", json!("1"), false),
            ("StringNotEquals", "aws:RequestTag/b", json!("1"), true),
            ("Null", "aws:RequestTag/b", json!("true"), true),
            ("Null", "aws:RequestTag/a", json!(true), false),
            ("ForAllValues:StringEquals", "aws:TagKeys", json!(["a", "b"]), true),
            ("ForAllValues:StringEquals", "aws:TagKeys", json!(["b"]), false),
            ("ForAnyValue:StringLike", "aws:TagKeys", json!("?"), true),
            ("NumericEquals", "aws:RequestTag/a", json!("1"), false),
        ] {
            assert_eq!(holds(operator, key, &wanted, &context), expected, "{operator} {key}");
        }
    }
}
