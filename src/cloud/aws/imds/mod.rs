//! Identifies the EC2 instance on which oven runs. The values come from the command line or from the instance's
//! metadata service (IMDSv2).

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
    /// The instance id, which is `i-` and 8 or 17 hexadecimal digits.
    pub id: String,
    /// The availability zone, such as `eu-central-1a`.
    pub zone: String,
    /// The region, such as `eu-central-1`.
    pub region: String,
}

/// The values from the command line, which take precedence over the metadata service. If both the id and the zone are
/// set, the service is not queried.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InstanceOverrides {
    pub instance_id: Option<String>,
    pub zone: Option<String>,
    /// The region in which to bake. It has to be the instance's region, because a volume can be attached only to an
    /// instance in the same region.
    pub region: Option<String>,
}

const FLAGS: &str = "--instance-id and --zone";
/// The time limit for connecting to the metadata service. Outside EC2, many routers drop packets to the service's
/// address. oven does not try to connect again, so that it reports the failure soon. If a packet is lost, the kernel
/// sends it again after one second, which is within the limit.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// The time limit for one response. An idle builder gets a response within milliseconds.
const READ_TIMEOUT: Duration = Duration::from_secs(5);
/// oven gives up after this many attempts without a response. More than one attempt is made, because the metadata
/// service of a busy builder can respond late. If the hop limit (the TTL of the responses) is too low, no response ever
/// arrives. oven then fails after half a minute, which is `LOST_ANSWERS * READ_TIMEOUT`.
const LOST_ANSWERS: u32 = 6;
/// The time limit for one request, including the request for its token and all retries. A request is retried if the
/// service returns an HTTP status of 500 or more.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(20);

/// Returns the instance on which this process runs.
///
/// Fails with [`Kind::Machine`] if the metadata service does not respond. The error then lists possible reasons. Fails
/// with [`Kind::Usage`] if a given value is malformed or contradicts another one.
pub async fn identify_instance(given: InstanceOverrides) -> Result<Instance> {
    let imds = Client::builder().connect_timeout(CONNECT_TIMEOUT).read_timeout(READ_TIMEOUT);
    let imds = imds.operation_attempt_timeout(OPERATION_TIMEOUT).operation_timeout(OPERATION_TIMEOUT).build();
    let region = ["AWS_REGION", "AWS_DEFAULT_REGION"].into_iter().find_map(|name| {
        let value = std::env::var(name).ok().filter(|value| !value.is_empty())?;
        Some((value, name))
    });
    identify(given, region, &imds).await
}

/// `environment` is the region from the environment, and the name of the variable that sets it.
async fn identify(
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
        let hint = format!(
            "Only volumes in the instance's zone can be attached. Set the region to {region}, or bake on an instance \
             in {wanted}."
        );
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
    // A different server may respond at the service's address, for example a proxy that returns an error page.
    if is_valid(&text) {
        return Ok(text);
    }
    let begin: String = text.chars().take(40).collect();
    let text = format!("the metadata service returned {begin:?} for {path}, but that is not {what}");
    let hint = format!("If another server responds at the address of the metadata service, pass {FLAGS}.");
    Err(Kind::Machine.failure(text).hint(hint).into())
}

/// Returns true if the service accepted the request but did not respond in time. `query` retries only in this case.
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

/// Returns an error that explains, if possible, why the metadata service did not return the value.
fn explain(error: &ImdsError, path: &str) -> anyhow::Error {
    if let ImdsError::ErrorResponse(answer) = error {
        let text = format!(
            "the metadata service returned the HTTP status {} for {path}",
            answer.response().status().as_u16()
        );
        let hint = format!("Pass {FLAGS} of the instance to which volumes are to be attached.");
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
        // The service sends the token with a limited TTL, which EC2 calls the hop limit. A container's network reduces
        // the TTL by one. So with a hop limit of 1, the token does not reach the container.
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
                "If this machine is not an EC2 instance, bake with `--disks direct`, which attaches no volume. In an \
                 IPv6-only subnet, set AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE=IPv6; if the service remains \
                 unreachable, pass {FLAGS}."
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

/// Returns whether the text has only the characters of a zone's name. The zone can be an availability zone, a Local
/// Zone or a Wavelength Zone.
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
    let text = format!("{zone} is not an availability zone");
    let hint =
        "Local and Wavelength Zones are not supported. Use an instance in a zone such as eu-central-1a.";
    Err(Kind::Machine.failure(text).hint(hint).into())
}
