//! The EBS direct APIs, which read and write snapshots block by block, over REST and JSON. The region stores the data.
//! The world has the snapshots' properties and permissions, as for EC2's calls.

mod blocks;
mod known;
mod lists;
mod request;
mod snapshots;
mod tokens;

pub use known::Known;
pub use snapshots::{NO_VOLUME, copied, resume};

use crate::actions::{Ctx, internal};
use crate::faults::{Turn, What};
use crate::http::{after, before, fault_name, service_of, spoil};
use crate::iam::{Target, permitted};
use crate::refusal::{Refusal, Result, refuse};
use crate::state::{Call, State};
use crate::wire::{Answer, Dropped, Request};
use crate::world::{Snapshot, Tags, World, now};
use oven::ids::{BLOCK, Digest};
use oven::ids::{RunId, SnapshotId};
use request::Members;
use serde_json::{Value, json};
use std::rc::Rc;
use std::time::Instant;
use tokio::time::sleep;

/// Returns whether a request is for EBS.
pub fn is_meant(path: &str) -> bool {
    path == "/snapshots" || path.starts_with("/snapshots/")
}

/// A call, and the fault that is planned for it.
struct Ask {
    action: &'static str,
    members: Members,
    body: Vec<u8>,
    turn: Option<Turn>,
    /// Whether the call sees the world before the last change.
    stale: bool,
    flipped: bool,
}

/// The response to a call that succeeded.
struct Told {
    status: u16,
    headers: Vec<(&'static str, String)>,
    kind: &'static str,
    body: Vec<u8>,
    /// The id of the created snapshot.
    made: Option<String>,
}

impl Told {
    fn json(status: u16, value: &Value) -> Self {
        let body = value.to_string().into_bytes();
        Self { status, headers: Vec::new(), kind: "application/json", body, made: None }
    }
}

/// Returns a `ValidationException` with its reason.
fn invalid(reason: &str, message: impl std::fmt::Display) -> Refusal {
    refuse(&format!("ValidationException:{reason}"), message)
}

fn absent(id: &str) -> Refusal {
    let text = format!("The snapshot '{id}' does not exist.");
    refuse("ResourceNotFoundException:SNAPSHOT_NOT_FOUND", text)
}

/// Converts an error of the region to an error of EBS.
fn of_region(error: anyhow::Error) -> Refusal {
    for cause in error.chain() {
        let text = cause.to_string();
        if let Some((reason, message)) =
            text.strip_prefix("ValidationException: ").and_then(|rest| rest.split_once(": "))
        {
            return invalid(reason, message);
        }
        if let Some((_, message)) = text.split_once("ResourceNotFoundException: ") {
            return refuse("ResourceNotFoundException:SNAPSHOT_NOT_FOUND", message);
        }
    }
    let refusal = internal(error);
    refuse("InternalServerException", refusal.message)
}

/// Replaces error codes of EC2 by those of EBS.
fn renamed(refusal: Refusal) -> Refusal {
    let code = match refusal.code.as_str() {
        "MissingAuthenticationToken" => "MissingAuthenticationTokenException",
        "AuthFailure" => "UnrecognizedClientException",
        "RequestExpired" => "InvalidSignatureException",
        "ExpiredToken" => "ExpiredTokenException",
        "InternalError" => "InternalServerException",
        _ => return refusal,
    };
    refuse(code, refusal.message)
}

/// Returns the response to a call that failed.
fn no(refusal: &Refusal, request: &str) -> Answer {
    let code = refusal.code.as_str();
    let (status, reason) = match code {
        "AccessDeniedException" => (403, Some("UNAUTHORIZED_ACCOUNT")),
        "ConflictException" => (409, None),
        "InternalServerException" => (500, None),
        "RequestThrottledException" => (400, Some("RESOURCE_LEVEL_THROTTLE")),
        "ResourceNotFoundException" => (404, Some("SNAPSHOT_NOT_FOUND")),
        "ServiceQuotaExceededException" => (402, Some("DEPENDENCY_SERVICE_QUOTA_EXCEEDED")),
        "UnknownOperationException" => (404, None),
        "ValidationException" => (400, Some("INVALID_PARAMETER_VALUE")),
        "ServiceUnavailable" | "ServiceUnavailableException" => (503, None),
        _ if code.starts_with("Internal") => (500, None),
        "ExpiredTokenException"
        | "InvalidSignatureException"
        | "MissingAuthenticationTokenException"
        | "UnrecognizedClientException" => (403, None),
        _ => (400, None),
    };
    let mut body = json!({"__type": code, "Message": refusal.message});
    if let Some(reason) = refusal.reason.as_deref().or(reason) {
        body["Reason"] = reason.into();
    }
    let headers = vec![("x-amzn-errortype", code.to_owned()), ("x-amzn-requestid", request.to_owned())];
    Answer { status, kind: "application/json", headers, body: body.to_string().into_bytes() }
}

/// Responds to a call.
pub async fn answer(ctx: &Rc<Ctx>, request: Request) -> std::result::Result<Answer, Dropped> {
    let id = RunId::new().0;
    let (action, members) = match request::read(&request) {
        Ok(read) => read,
        Err((action, refusal)) => {
            record(ctx, action, &Members::default(), refusal.code.clone(), None);
            return Ok(no(&refusal, &id));
        }
    };
    let service = service_of(ctx, &request.headers).map_err(renamed);
    let wrong = service.and_then(|service| match service.as_str() {
        "ebs" => Ok(()),
        other => {
            let text = format!("Credential should be scoped to correct service: 'ebs', and not '{other}'.");
            Err(refuse("InvalidSignatureException", text))
        }
    });
    if let Err(refusal) = wrong {
        record(ctx, action, &members, refusal.code.clone(), None);
        return Ok(no(&refusal, &id));
    }
    let given = members.clone();
    let fault = spoil(ctx, action, false);
    let wait = ctx.state().latency(action);
    sleep(wait).await;
    if let Some(answer) = before(&fault, |how| record(ctx, action, &given, how, None)).await? {
        return Ok(answer);
    }
    let result = match fault.as_ref().and_then(What::refusal) {
        Some(refusal) => Err(refusal),
        None => {
            let ask = Ask {
                action,
                members,
                body: request.body,
                turn: if let Some(What::Turns(turn)) = fault { Some(turn) } else { None },
                stale: fault == Some(What::Stale),
                flipped: fault == Some(What::Flipped),
            };
            ctx.state().at_work += 1;
            let result = perform(ctx, ask).await.map_err(renamed);
            ctx.state().at_work -= 1;
            result
        }
    };
    let how = match (&result, &fault) {
        (Ok(told), None) => told.status.to_string(),
        (Ok(told), Some(_)) => format!("{} {}", told.status, fault_name(&fault)),
        (Err(refusal), _) => refusal.code.clone(),
    };
    record(ctx, action, &given, how, result.as_ref().ok().and_then(|told| told.made.clone()));
    let answer = match (result, &fault) {
        (Ok(_), Some(What::ErrorAfter(code))) => {
            no(&refuse(code, "It was planned so, after the effect."), &id)
        }
        (Ok(Told { status, mut headers, kind, body, .. }), _) => {
            headers.push(("x-amzn-requestid", id));
            Answer { status, kind, headers, body }
        }
        (Err(refusal), _) => no(&refusal, &id),
    };
    after(&fault, answer).await
}

fn record(ctx: &Ctx, action: &str, members: &Members, answer: String, made: Option<String>) {
    let (service, action, params) = ("ebs".to_owned(), action.to_owned(), members.fields().clone());
    let call = Call { service, action, params, dry_run: false, answer, made, at: now() };
    ctx.state().record(call);
}

async fn perform(ctx: &Rc<Ctx>, ask: Ask) -> Result<Told> {
    let id = ask.members.get("SnapshotId").unwrap_or_default();
    throttle(&mut ctx.state(), ask.action, id)?;
    match ask.action {
        "CompleteSnapshot" => snapshots::complete(ctx, ask).await,
        "GetSnapshotBlock" => blocks::get(ctx, ask).await,
        "ListChangedBlocks" => lists::changed(ctx, ask).await,
        "ListSnapshotBlocks" => lists::all(ctx, ask).await,
        "PutSnapshotBlock" => blocks::put(ctx, ask).await,
        "StartSnapshot" => snapshots::start(ctx, ask).await,
        other => Err(refuse("UnknownOperationException", other)),
    }
}

fn throttle(state: &mut State, action: &str, id: &str) -> Result<()> {
    let Some(throttle) = state.options.direct.throttle else { return Ok(()) };
    let (name, bucket, reason) = match action {
        "GetSnapshotBlock" => (format!("{action} {id}"), throttle.gets, "RESOURCE_LEVEL_THROTTLE"),
        "PutSnapshotBlock" => (format!("{action} {id}"), throttle.puts, "RESOURCE_LEVEL_THROTTLE"),
        "StartSnapshot" | "CompleteSnapshot" => (action.to_owned(), throttle.snapshots, "ACCOUNT_THROTTLED"),
        _ => (action.to_owned(), throttle.lists, "ACCOUNT_THROTTLED"),
    };
    match state.buckets.take_from(name, bucket, Instant::now()) {
        true => Ok(()),
        false => Err(refuse(&format!("RequestThrottledException:{reason}"), "Rate exceeded.")),
    }
}

/// Returns a snapshot in any state. Fails if this action is not permitted for it.
fn permitted_snapshot<'a>(state: &State, world: &'a World, ask: &Ask, id: &str) -> Result<&'a Snapshot> {
    let (options, none) = (&state.options, Tags::new());
    let found = world.snapshots.get(id).filter(|snapshot| snapshot.common.is_visible(now()));
    let tags = found.map_or(&none, |snapshot| &snapshot.common.tags);
    permitted(options, &format!("ebs:{}", ask.action), &[Target::new(id, tags)])?;
    usable(state, world, id)
}

/// Returns a snapshot that the account may use. The caller must have checked the permission for the action, together
/// with all other resources of the call.
fn usable<'a>(state: &State, world: &'a World, id: &str) -> Result<&'a Snapshot> {
    let options = &state.options;
    let found = world.snapshots.get(id).filter(|snapshot| snapshot.common.is_visible(now()));
    let snapshot = found.ok_or_else(|| absent(id))?;
    let ours = snapshot.common.owner == options.account;
    if !ours && !snapshot.shared {
        if snapshot.public {
            let text = "Public snapshots of other accounts are not supported by the EBS direct APIs.";
            return Err(refuse("AccessDeniedException:UNAUTHORIZED_ACCOUNT", text));
        }
        return Err(absent(id));
    }
    if snapshot.encrypted && !options.may_use_key(snapshot.key.as_deref()) {
        let text = "You do not have sufficient access to the KMS key of the snapshot.";
        return Err(refuse("AccessDeniedException:DEPENDENCY_ACCESS_DENIED", text));
    }
    Ok(snapshot)
}

/// If a snapshot is unknown, adds imported images and their snapshots.
async fn look_for(ctx: &Ctx, id: &str) -> Result<()> {
    let known = ctx.state().world.snapshots.contains_key(id);
    if known { Ok(()) } else { ctx.import().await }
}

/// Checks that a snapshot may be read, and returns its size in GiB.
fn readable(ctx: &Ctx, ask: &Ask, id: &str) -> Result<u32> {
    let state = ctx.state();
    let world = if ask.stale { &state.before.0 } else { &state.world };
    let snapshot = permitted_snapshot(&state, world, ask, id)?;
    match snapshot.state(now()) {
        "completed" => Ok(snapshot.size),
        other => {
            let text = format!("The snapshot '{id}' is in the '{other}' state, and not completed.");
            Err(invalid("INVALID_SNAPSHOT_ID", text))
        }
    }
}

/// Returns a snapshot's id if it has the form that EBS accepts.
fn id_of(members: &Members, name: &str) -> Result<SnapshotId> {
    let id = members.required(name)?;
    let digits = id.strip_prefix("snap-").unwrap_or_default();
    if digits.is_empty() || id.len() > 64 || !digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        return Err(invalid("INVALID_SNAPSHOT_ID", format!("'{id}' is no id of a snapshot.")));
    }
    Ok(SnapshotId(id.to_owned()))
}

/// Returns the number of blocks of a snapshot with a size in GiB.
fn blocks_of(size: u32) -> u32 {
    ((u64::from(size) << 30) / BLOCK as u64) as u32
}

fn encoded(digest: &Digest) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(digest)
}

fn decoded(checksum: &str) -> Option<Digest> {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.decode(checksum).ok()?.try_into().ok()
}
