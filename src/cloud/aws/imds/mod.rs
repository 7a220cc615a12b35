//! Identifies the EC2 instance on which oven runs, through IMDSv2 or from the command line.

#[cfg(test)]
mod tests;

use crate::error::Kind;
use anyhow::Result;
use aws_config::imds::client::Client;
use aws_config::imds::client::error::ImdsError;
use std::error::Error;
use std::time::Duration;

/// The instance to which volumes are attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// `i-` and 17 hexadecimal digits.
    pub id: String,
    /// `eu-central-1a`.
    pub zone: String,
    /// `eu-central-1`.
    pub region: String,
}

/// The values from the command line, which take precedence. With both id and zone, the metadata service is not queried.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InstanceOverrides {
    pub instance_id: Option<String>,
    pub zone: Option<String>,
    /// The region to work in. It must be the instance's own, because a volume cannot be attached across regions.
    pub region: Option<String>,
}

const FLAGS: &str = "--instance-id and --zone";
/// The time limit of a connection. It is not retried: outside EC2 many routers drop packets to this address, and oven
/// should fail soon then. The kernel repeats its first packet after one second, so one packet may be lost.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// The time limit of one response. On an idle builder it takes milliseconds.
const READ_TIMEOUT: Duration = Duration::from_secs(5);
/// The number of responses in a row that may be lost before oven gives up. A busy builder responds late. If the hop
/// limit is too low, no response ever arrives, and oven fails after `LOST_ANSWERS * READ_TIMEOUT`, half a minute.
const LOST_ANSWERS: u32 = 6;
/// The time limit of one request, including the one for its token. The service sometimes returns a 5xx, which is
/// retried within this time.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(20);

/// Returns the instance on which this process runs.
///
/// Fails with [`Kind::Machine`], and with possible reasons, if the metadata service does not respond. Fails with
/// [`Kind::Usage`] if a given value is malformed or contradicts another one.
pub async fn identify_instance(given: InstanceOverrides) -> Result<Instance> {
    let imds = Client::builder().connect_timeout(CONNECT_TIMEOUT).read_timeout(READ_TIMEOUT);
    let imds = imds.operation_attempt_timeout(OPERATION_TIMEOUT).operation_timeout(OPERATION_TIMEOUT).build();
    let region = ["AWS_REGION", "AWS_DEFAULT_REGION"].into_iter().find_map(|name| {
        let value = std::env::var(name).ok().filter(|value| !value.is_empty())?;
        Some((value, name))
    });
    who(given, region, &imds).await
}

/// `environment` is the region from the environment, with the name of its variable.
async fn who(
    given: InstanceOverrides,
    environment: Option<(String, &str)>,
    imds: &Client,
) -> Result<Instance> {
    let id = match given.instance_id {
        Some(id) => {
            parse_flag(id, is_instance, "--instance-id", "an instance id such as i-0123456789abcdef0")?
        }
        None => query(imds, "/latest/meta-data/instance-id", is_instance, "an instance id").await?,
    };
    let zone = match given.zone {
        Some(zone) => parse_flag(zone, is_zone_name, "--zone", "an availability zone such as eu-central-1a")?,
        None => {
            let path = "/latest/meta-data/placement/availability-zone";
            query(imds, path, is_zone_name, "a zone's name").await?
        }
    };
    let region = region_of(&zone)?.to_owned();
    let wanted = given.region.map(|region| (region, "--region or oven.toml")).or(environment);
    if let Some((wanted, by)) = wanted.filter(|(wanted, _)| *wanted != region) {
        let text = format!("{id} is in {zone}, but {by} sets the region {wanted}");
        let hint = "An instance can attach only volumes of its own zone. Bake on an instance of that region.";
        return Err(Kind::Usage.failure(text).hint(hint).into());
    }
    Ok(Instance { id, zone, region })
}

fn parse_flag(text: String, is_valid: fn(&str) -> bool, flag: &str, what: &str) -> Result<String> {
    if is_valid(&text) {
        Ok(text)
    } else {
        Err(Kind::Usage.error(format!("`{flag}` has to be {what}, but is {text:?}")))
    }
}

async fn query(imds: &Client, path: &str, is_valid: fn(&str) -> bool, what: &str) -> Result<String> {
    let mut lost = 0;
    let text: String = loop {
        match imds.get(path).await {
            Ok(answer) => break answer.into(),
            Err(error) if is_silence(&error) && lost + 1 < LOST_ANSWERS => lost += 1,
            Err(error) => return Err(explain(&error, path)),
        }
    };
    // Another server may respond at that address, such as a proxy with an error page.
    if is_valid(&text) {
        return Ok(text);
    }
    let begin: String = text.chars().take(40).collect();
    let text = format!("the metadata service returned {begin:?} for {path}, but that is not {what}");
    let hint = format!("If another server responds at its address, pass {FLAGS}.");
    Err(Kind::Machine.failure(text).hint(hint).into())
}

/// Returns whether the service accepted the request, but its response did not arrive in time. A response of any kind,
/// or a refused connection, is not retried.
fn is_silence(error: &ImdsError) -> bool {
    let silent = |cause: &String| cause.contains("read timeout") || cause.contains("request has timed out");
    causes(error).iter().any(silent)
}

/// Returns the text of an error and of its causes.
fn causes(error: &ImdsError) -> Vec<String> {
    let mut causes = vec![error.to_string()];
    let mut cause: Option<&(dyn Error + 'static)> = error.source();
    while let Some(deeper) = cause {
        causes.push(deeper.to_string());
        cause = deeper.source();
    }
    causes
}

/// Returns the reason why the metadata service does not respond, as far as the error shows it.
fn explain(error: &ImdsError, path: &str) -> anyhow::Error {
    if let ImdsError::ErrorResponse(answer) = error {
        let text = format!(
            "the metadata service returned the HTTP status {} for {path}",
            answer.response().status().as_u16()
        );
        let hint = format!(
            "If this machine is not an EC2 instance, pass {FLAGS} of the instance that volumes are attached to."
        );
        return Kind::Machine.failure(text).hint(hint).into();
    }
    let causes = causes(error);
    let has_cause = |words: &str| causes.iter().any(|cause| cause.contains(words));
    let lacks_token = matches!(error, ImdsError::FailedToLoadToken(_));
    let (text, hint) = if has_cause("request forbidden") {
        (
            "the metadata service is turned off for this instance (it returns the HTTP status 403)"
                .to_owned(),
            format!(
                "Turn it on (aws ec2 modify-instance-metadata-options --http-endpoint enabled), or pass {FLAGS}."
            ),
        )
    } else if is_silence(error) && lacks_token {
        // The response to the request for a token is sent with a limited TTL, the hop limit. A bridge reduces it by
        // one.
        (
            format!(
                "the metadata service accepts a request for a token, but its response does not arrive \
                 ({LOST_ANSWERS} attempts)"
            ),
            format!(
                "In a container, raise the hop limit (aws ec2 modify-instance-metadata-options \
                 --http-put-response-hop-limit 2), use the host's network, or pass {FLAGS}."
            ),
        )
    } else if matches!(error, ImdsError::FailedToLoadToken(failed) if failed.is_dispatch_failure()) {
        (
            format!("the metadata service cannot be reached: {}", causes.last().map_or("", |c| c)),
            format!(
                "Check that this is an EC2 instance. In a subnet with IPv6 only, set \
                 AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE=IPv6; if the service is unreachable, pass {FLAGS}."
            ),
        )
    } else {
        (
            format!("cannot read {path} from the metadata service: {}", causes.join(": ")),
            format!("Pass {FLAGS}, so that oven does not need the metadata service."),
        )
    };
    Kind::Machine.failure(text).hint(hint).into()
}

fn is_instance(id: &str) -> bool {
    id.strip_prefix("i-").is_some_and(|digits| {
        matches!(digits.len(), 8 | 17) && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    })
}

/// Returns whether this can be the name of a zone of any type.
fn is_zone_name(zone: &str) -> bool {
    zone.contains('-') && zone.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'z' | b'-'))
}

/// Returns the region of a zone: `eu-central-1` for `eu-central-1a`. Local and Wavelength zones are rejected, because
/// they store no snapshots and lack the volume types that a bake needs.
fn region_of(zone: &str) -> Result<&str> {
    let region = zone.strip_suffix(|c: char| c.is_ascii_lowercase()).unwrap_or_default();
    let (place, number) = region.rsplit_once('-').unwrap_or_default();
    let letters = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_lowercase());
    let digits = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
    if digits && place.contains('-') && place.split('-').all(letters) {
        return Ok(region);
    }
    let text = format!("{zone} is not an availability zone of a region");
    let hint =
        "Local and Wavelength Zones are not supported. Use an instance in a zone such as eu-central-1a.";
    Err(Kind::Machine.failure(text).hint(hint).into())
}
