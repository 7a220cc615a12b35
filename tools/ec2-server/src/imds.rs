//! The instance metadata service. Only version 2 is supported.

use crate::options::{Builder, ServerOptions};
use crate::world::{NEVER, Time, now, rfc3339};
use serde_json::json;
use std::collections::BTreeMap;

/// The lifetime of the role's keys.
const KEYS: Time = 6 * 3600 * 1000;

/// The lifetime of a token in seconds. This header is in the request and in the response.
pub const TTL: &str = "x-aws-ec2-metadata-token-ttl-seconds";

/// A response: the status and the body.
pub type Answer = (u16, String);

/// The issued tokens with their times of expiry, and the number of issued keys.
#[derive(Debug, Default)]
pub struct Imds {
    tokens: BTreeMap<String, Time>,
    /// The number of keys that were issued. If keys expire after some calls, each request gets a new key.
    keys: u32,
}

/// The headers that the service uses.
#[derive(Debug, Default)]
pub struct Headers<'a> {
    pub ttl: Option<&'a str>,
    pub token: Option<&'a str>,
    pub forwarded: bool,
}

impl Imds {
    pub fn answer(
        &mut self,
        method: &str,
        path: &str,
        headers: &Headers<'_>,
        builder: &Builder,
        options: &ServerOptions,
    ) -> Answer {
        let none = |status: u16| (status, String::new());
        if path == "/latest/api/token" {
            // A request that a proxy has forwarded gets no token.
            return match (method, headers.ttl.and_then(|ttl| ttl.parse::<u64>().ok())) {
                ("PUT", _) if headers.forwarded => none(403),
                ("PUT", Some(seconds @ 1..=21600)) => {
                    let token = format!("{}==", oven::ids::RunId::new().0);
                    self.tokens.insert(token.clone(), now() + seconds * 1000);
                    (200, token)
                }
                ("PUT", _) => none(400),
                _ => none(405),
            };
        }
        if headers.token.is_none_or(|token| self.tokens.get(token).is_none_or(|good| now() >= *good)) {
            return none(401);
        }
        if method != "GET" {
            return none(405);
        }
        let answer = path.strip_prefix("/latest/").and_then(|path| get(path, builder, options, self.keys));
        if options.calls_per_key.is_some() && path.contains("/security-credentials/") {
            self.keys += 1;
        }
        match answer {
            Some(body) => (200, body),
            None => none(404),
        }
    }
}

fn get(path: &str, builder: &Builder, options: &ServerOptions, given: u32) -> Option<String> {
    let role = options.role.as_ref();
    Some(match path.strip_suffix('/').unwrap_or(path) {
        "" => "dynamic\nmeta-data".into(),
        "dynamic" => "instance-identity/".into(),
        "dynamic/instance-identity" => "document".into(),
        "dynamic/instance-identity/document" => json!({
            "accountId": options.account, "architecture": "x86_64", "availabilityZone": builder.zone,
            "imageId": "ami-0123456789abcdef0", "instanceId": builder.id, "instanceType": "m5.large",
            "pendingTime": rfc3339(0), "privateIp": "10.0.0.1", "region": options.region, "version": "2017-09-30",
        })
        .to_string(),
        "meta-data" => "ami-id\niam/\ninstance-id\ninstance-type\nplacement/\nservices/".into(),
        "meta-data/ami-id" => "ami-0123456789abcdef0".into(),
        "meta-data/instance-id" => builder.id.clone(),
        "meta-data/instance-type" => "m5.large".into(),
        "meta-data/placement" => "availability-zone\nregion".into(),
        "meta-data/placement/availability-zone" => builder.zone.clone(),
        "meta-data/placement/region" => options.region.clone(),
        "meta-data/services" => "domain\npartition".into(),
        "meta-data/services/domain" => "amazonaws.com".into(),
        "meta-data/services/partition" => "aws".into(),
        "meta-data/iam" => role.map(|_| "info\nsecurity-credentials/".into())?,
        "meta-data/iam/info" => {
            let arn = format!("arn:aws:iam::{}:instance-profile/{}", options.account, role?);
            json!({"Code": "Success", "LastUpdated": rfc3339(now()), "InstanceProfileArn": arn,
                   "InstanceProfileId": "AIPA0123456789EXAMPLE"})
            .to_string()
        }
        "meta-data/iam/security-credentials" => role?.clone(),
        path if path.strip_prefix("meta-data/iam/security-credentials/") == role.map(String::as_str) => {
            keys(now().min(NEVER - KEYS), given).to_string()
        }
        _ => return None,
    })
}

fn keys(now: Time, given: u32) -> serde_json::Value {
    json!({
        "Code": "Success", "LastUpdated": rfc3339(now), "Type": "AWS-HMAC",
        "AccessKeyId": format!("ASIAOVENTESTSERVER{:02}", given + 1), "SecretAccessKey": "not a secret: every key is taken",
        "Token": "of-the-test-server", "Expiration": rfc3339(now + KEYS),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_without_a_token() {
        let options = ServerOptions::default();
        let builder = options.builders().remove(0);
        let mut imds = Imds::default();
        let mut ask = |method: &str, path: &str, headers: Headers<'_>| {
            imds.answer(method, path, &headers, &builder, &options)
        };
        let id = "/latest/meta-data/instance-id";
        assert_eq!(ask("GET", id, Headers::default()).0, 401);
        assert_eq!(ask("PUT", "/latest/api/token", Headers::default()).0, 400);
        let ttl = || Headers { ttl: Some("60"), ..Headers::default() };
        assert_eq!(
            ask("PUT", "/latest/api/token", Headers { ttl: Some("21601"), ..Headers::default() }).0,
            400
        );
        assert_eq!(ask("PUT", "/latest/api/token", Headers { forwarded: true, ..ttl() }).0, 403);
        assert_eq!(ask("GET", "/latest/api/token", ttl()).0, 405);
        let (status, token) = ask("PUT", "/latest/api/token", ttl());
        assert_eq!(status, 200);
        let with = || Headers { token: Some(&token), ..Headers::default() };
        assert_eq!(ask("GET", id, Headers { token: Some("other"), ..Headers::default() }).0, 401);
        assert_eq!(ask("GET", id, with()), (200, options.instance_id.clone()));
        assert_eq!(ask("GET", "/latest/meta-data/placement/availability-zone", with()).1, "us-east-1a");
        let document = ask("GET", "/latest/dynamic/instance-identity/document", with()).1;
        let document: serde_json::Value = serde_json::from_str(&document).unwrap();
        assert_eq!(document["instanceId"], options.instance_id);
        assert_eq!(document["region"], "us-east-1");
        assert_eq!(ask("GET", "/latest/meta-data/iam/security-credentials/", with()).1, "oven-builder");
        let keys = ask("GET", "/latest/meta-data/iam/security-credentials/oven-builder", with()).1;
        assert_eq!(serde_json::from_str::<serde_json::Value>(&keys).unwrap()["Code"], "Success");
        assert_eq!(ask("GET", "/latest/meta-data/iam/security-credentials/other", with()).0, 404);
        assert_eq!(ask("GET", "/latest/user-data", with()).0, 404);
    }
}
