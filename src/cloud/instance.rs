//! Who am I: the instance that oven runs on, by IMDSv2 or as told.

use crate::error::Kind;
use anyhow::Result;
use aws_config::imds::client::Client;
use aws_config::imds::client::error::ImdsError;
use std::error::Error;
use std::time::Duration;

/// The instance that volumes are attached to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// `i-` and 17 hexadecimal digits.
    pub id: String,
    /// `eu-central-1a`.
    pub zone: String,
    /// `eu-central-1`.
    pub region: String,
}

/// What was said of it on the command line: it wins. With both id and zone the metadata service is not asked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Given {
    pub instance_id: Option<String>,
    pub zone: Option<String>,
    /// The region to work in. It has to be the instance's own: a volume cannot be attached from elsewhere.
    pub region: Option<String>,
}

const FLAGS: &str = "--instance-id and --zone";
/// How long a connection may take. It is not retried: elsewhere than on EC2 many a router drops what is sent to this
/// address, and that should be an error soon. The kernel sends its first packet again after one second, so one may be
/// lost.
const CONNECT: Duration = Duration::from_secs(2);
/// How long one answer is waited for. On a builder with nothing else to do it takes milliseconds.
const READ: Duration = Duration::from_secs(5);
/// How many answers in a row may fail to arrive before oven gives up. A busy builder answers late, and a late answer is
/// as good as an early one; a hop limit that is too low swallows every answer, and that becomes an error after
/// `LOST_ANSWERS * READ`, half a minute.
const LOST_ANSWERS: u32 = 6;
/// How long one request may take, with the one for its token. A 5xx, which the service answers now and then, is retried
/// within it.
const WHOLE: Duration = Duration::from_secs(20);

/// The instance that this process runs on.
///
/// Fails with [`Kind::Machine`] where the metadata service does not tell, and says why it might not; with
/// [`Kind::Usage`] if what was given is no id or no zone, or contradicts itself.
pub async fn who_am_i(given: Given) -> Result<Instance> {
    let imds = Client::builder().connect_timeout(CONNECT).read_timeout(READ);
    let imds = imds.operation_attempt_timeout(WHOLE).operation_timeout(WHOLE).build();
    let region = ["AWS_REGION", "AWS_DEFAULT_REGION"].into_iter().find_map(|name| {
        let value = std::env::var(name).ok().filter(|value| !value.is_empty())?;
        Some((value, name))
    });
    who(given, region, &imds).await
}

/// `environment`: the region that it says, and the name of the variable that does.
async fn who(given: Given, environment: Option<(String, &str)>, imds: &Client) -> Result<Instance> {
    let id = match given.instance_id {
        Some(id) => checked(id, is_instance, "--instance-id", "an instance's id, as i-0123456789abcdef0")?,
        None => read(imds, "/latest/meta-data/instance-id", is_instance, "an instance's id").await?,
    };
    let zone = match given.zone {
        Some(zone) => checked(zone, is_zone_name, "--zone", "an availability zone's name, as eu-central-1a")?,
        None => {
            let path = "/latest/meta-data/placement/availability-zone";
            read(imds, path, is_zone_name, "a zone's name").await?
        }
    };
    let region = region_of(&zone)?.to_owned();
    let wanted = given.region.map(|region| (region, "--region or oven.toml")).or(environment);
    if let Some((wanted, by)) = wanted.filter(|(wanted, _)| *wanted != region) {
        let text = format!("{id} is in {zone}, and {wanted} is the region to work in (by {by})");
        let hint = "A volume is attached in its instance's own zone: bake on an instance of that region.";
        return Err(Kind::Usage.failure(text).hint(hint).into());
    }
    Ok(Instance { id, zone, region })
}

fn checked(text: String, fits: fn(&str) -> bool, flag: &str, what: &str) -> Result<String> {
    if fits(&text) {
        Ok(text)
    } else {
        Err(Kind::Usage.error(format!("`{flag}` is {text:?}: it should be {what}")))
    }
}

async fn read(imds: &Client, path: &str, fits: fn(&str) -> bool, what: &str) -> Result<String> {
    let mut lost = 0;
    let text: String = loop {
        match imds.get(path).await {
            Ok(answer) => break answer.into(),
            Err(error) if is_silence(&error) && lost + 1 < LOST_ANSWERS => lost += 1,
            Err(error) => return Err(explained(&error, path)),
        }
    };
    // Something else may answer at that address: a proxy's page of apology, say.
    if fits(&text) {
        return Ok(text);
    }
    let begin: String = text.chars().take(40).collect();
    let text = format!("the metadata service answers {begin:?} to {path}, which is not {what}");
    let hint = format!("If something else answers in its place, give {FLAGS}.");
    Err(Kind::Machine.failure(text).hint(hint).into())
}

/// Whether the service took the request and its answer did not arrive in time. Whatever it answers, and a connection
/// that is refused, is no silence.
fn is_silence(error: &ImdsError) -> bool {
    let silent = |cause: &String| cause.contains("read timeout") || cause.contains("request has timed out");
    causes(error).iter().any(silent)
}

/// An error's text, and those of its causes.
fn causes(error: &ImdsError) -> Vec<String> {
    let mut causes = vec![error.to_string()];
    let mut cause: Option<&(dyn Error + 'static)> = error.source();
    while let Some(deeper) = cause {
        causes.push(deeper.to_string());
        cause = deeper.source();
    }
    causes
}

/// Why the metadata service does not answer, as far as its silence tells.
fn explained(error: &ImdsError, path: &str) -> anyhow::Error {
    if let ImdsError::ErrorResponse(answer) = error {
        let text = format!("the metadata service answers {} to {path}", answer.response().status().as_u16());
        let hint = format!(
            "If this is no EC2 instance, give {FLAGS} of the one that volumes are to be attached to."
        );
        return Kind::Machine.failure(text).hint(hint).into();
    }
    let causes = causes(error);
    let said = |words: &str| causes.iter().any(|cause| cause.contains(words));
    let lacks_token = matches!(error, ImdsError::FailedToLoadToken(_));
    let (text, hint) = if said("request forbidden") {
        (
            "the metadata service is turned off for this instance (it answers 403)".to_owned(),
            format!(
                "Turn it on (aws ec2 modify-instance-metadata-options --http-endpoint enabled), or give {FLAGS}."
            ),
        )
    } else if is_silence(error) && lacks_token {
        // Its answer to the request for a token has a TTL of its own, the hop limit; a bridge takes one away.
        (
            format!(
                "the metadata service takes the request for a token, and its answer does not arrive ({LOST_ANSWERS} tries)"
            ),
            format!(
                "In a container: raise the hop limit (aws ec2 modify-instance-metadata-options \
                 --http-put-response-hop-limit 2), use the host's network, or give {FLAGS}."
            ),
        )
    } else if matches!(error, ImdsError::FailedToLoadToken(failed) if failed.is_dispatch_failure()) {
        (
            format!("the metadata service cannot be reached: {}", causes.last().map_or("", |c| c)),
            format!(
                "Is this an EC2 instance? In a subnet with IPv6 only, set \
                 AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE=IPv6; where it is out of reach, give {FLAGS}."
            ),
        )
    } else {
        (
            format!("the metadata service does not tell {path}: {}", causes.join(": ")),
            format!("Give {FLAGS} to do without it."),
        )
    };
    Kind::Machine.failure(text).hint(hint).into()
}

fn is_instance(id: &str) -> bool {
    id.strip_prefix("i-").is_some_and(|digits| {
        matches!(digits.len(), 8 | 17) && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    })
}

/// A name of any kind of zone: a region's, and more.
fn is_zone_name(zone: &str) -> bool {
    zone.contains('-') && zone.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'z' | b'-'))
}

/// `eu-central-1` of `eu-central-1a`. Local and Wavelength zones hold no snapshots of their own, and not the volume
/// types that a bake asks for.
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
        "A Local Zone or a Wavelength Zone cannot bake: use an instance in a zone such as eu-central-1a.";
    Err(Kind::Machine.failure(text).hint(hint).into())
}

#[cfg(test)]
mod tests;
