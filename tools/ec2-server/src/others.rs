//! The actions of other services that oven needs: SSM's GetParameter, and STS's GetCallerIdentity and AssumeRole.

use crate::iam::{Target, permitted};
use crate::options::ServerOptions;
use crate::params::Params;
use crate::refusal::{Refusal, Result, no, refuse};
use crate::world::{now, rfc3339};
use serde_json::{Map, Value, json};

/// Returns the action of a call to SSM from the header `X-Amz-Target`.
pub fn ssm_action(target: &str) -> Option<&str> {
    target.strip_prefix("AmazonSSM.")
}

pub fn ssm(action: &str, body: &[u8], options: &ServerOptions) -> Result<Value> {
    if action != "GetParameter" {
        no!("UnknownOperationException", "{action}");
    }
    let Ok(mut body) = serde_json::from_slice::<Map<String, Value>>(body) else {
        no!("SerializationException", "the body is no JSON object")
    };
    let Some(Value::String(name)) = body.remove("Name") else {
        no!("ValidationException", "Name is missing")
    };
    if body.remove("WithDecryption").is_some_and(|value| !value.is_boolean()) {
        no!("SerializationException", "WithDecryption is no boolean");
    }
    if let Some(unknown) = body.keys().next() {
        no!("SerializationException", "{unknown} is not known");
    }
    let account = if name.starts_with("/aws/") { "" } else { &options.account };
    let arn = format!("arn:aws:ssm:{}:{account}:parameter/{}", options.region, name.trim_start_matches('/'));
    permitted(options, "ssm:GetParameter", &[Target::Named(&arn)])?;
    let Some(value) = options.parameters.get(&name) else { no!("ParameterNotFound", "") };
    Ok(json!({"Parameter": {
        "ARN": arn, "DataType": "aws:ec2:image", "LastModifiedDate": 1.7e9, "Name": name, "Type": "String",
        "Value": value, "Version": 1,
    }}))
}

/// Formats an error as SSM does.
pub fn ssm_error(refusal: &Refusal) -> String {
    json!({"__type": refusal.code, "message": refusal.message}).to_string()
}

pub fn sts(action: &str, mut params: Params, options: &ServerOptions) -> Result<String> {
    let account = &options.account;
    let inside = match action {
        "GetCallerIdentity" => {
            let role = options.role.as_deref().unwrap_or("tester");
            let session = &options.instance_id;
            format!(
                "<Arn>arn:aws:sts::{account}:assumed-role/{role}/{session}</Arn><UserId>AROA0123456789EXAMPLE:{session}\
                 </UserId><Account>{account}</Account>"
            )
        }
        "AssumeRole" => {
            let (role, session) = (params.required("RoleArn")?, params.required("RoleSessionName")?);
            params.text("DurationSeconds");
            let until = rfc3339(now() + 3_600_000);
            format!(
                "<Credentials><AccessKeyId>ASIAOVENTESTSERVER02</AccessKeyId><SecretAccessKey>not a secret\
                 </SecretAccessKey><SessionToken>of-the-test-server</SessionToken><Expiration>{until}</Expiration>\
                 </Credentials><AssumedRoleUser><AssumedRoleId>AROA0123456789EXAMPLE:{0}</AssumedRoleId><Arn>{1}/{0}\
                 </Arn></AssumedRoleUser>",
                crate::xml::escape(&session),
                crate::xml::escape(&role)
            )
        }
        other => return Err(refuse("InvalidAction", format!("{other} is not known"))),
    };
    params.done()?;
    Ok(format!(
        "<{action}Response xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><{action}Result>{inside}</{action}Result>\
         <ResponseMetadata><RequestId>00000000-0000-0000-0000-000000000000</RequestId></ResponseMetadata></{action}Response>"
    ))
}
