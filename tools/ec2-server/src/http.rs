//! The listener. It determines the service of each request, counts it, applies planned faults, and responds.

use crate::actions::{self, Ask, Ctx};
use crate::clock;
use crate::control;
use crate::direct;
use crate::faults::What;
use crate::imds::{self, Headers};
use crate::options::Builder;
use crate::others;
use crate::params::Params;
use crate::refusal::{Refusal, Result, no, refuse};
use crate::state::Call;
use crate::wire::{self, Answer, Dropped, Headers as Head, Request};
use crate::world::now;
use crate::xml;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::time::sleep;

const VERSION: &str = "2016-11-15";

fn answer(status: u16, kind: &'static str, body: String) -> Answer {
    Answer { status, kind, headers: Vec::new(), body: body.into_bytes() }
}

/// Serves until the future is dropped. IMDS describes `builder`.
pub async fn serve(ctx: Rc<Ctx>, listener: TcpListener, builder: Builder) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            // For example, no descriptors are free. Some connection will end and free one.
            Err(error) => {
                eprintln!("oven-ec2-server: {error}");
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        _ = stream.set_nodelay(true);
        let (ctx, builder) = (ctx.clone(), builder.clone());
        tokio::task::spawn_local(async move {
            let handle = async |request: Request| {
                let (at, builder) = (ctx.clone(), builder.clone());
                // The call runs in a separate task, so that it takes effect even if the client closes the connection.
                let task = tokio::task::spawn_local(async move { handle(&at, request, &builder).await });
                let told =
                    task.await.unwrap_or_else(|panic| Ok(answer(500, "text/plain", panic.to_string())));
                told.map(|mut told| {
                    told.headers.push(("Date", clock::http_date(clock::seconds(&ctx.state().options))));
                    told
                })
            };
            // It is not an error if the client closes the connection.
            _ = wire::serve(stream, handle).await;
        });
    }
}

async fn handle(ctx: &Rc<Ctx>, request: Request, builder: &Builder) -> std::result::Result<Answer, Dropped> {
    let Request { method, path, headers, body, .. } = &request;
    if let Some(path) = path.strip_prefix("/_oven/") {
        let (status, body) = control::answer(ctx, method, path, body).await;
        return Ok(answer(status, "application/json", body));
    }
    if direct::is_meant(path) {
        return direct::answer(ctx, request).await;
    }
    if path.starts_with("/latest/") || path == "/latest" {
        return metadata(ctx, method, path, headers, builder).await;
    }
    if let Some(action) = headers.get("x-amz-target").and_then(others::ssm_action) {
        return ssm(ctx, action, body).await;
    }
    query(ctx, headers, body).await
}

/// A call as it came in.
struct Received<'a> {
    service: &'a str,
    action: &'a str,
    params: &'a BTreeMap<String, String>,
    dry_run: bool,
}

fn record(ctx: &Ctx, received: &Received<'_>, answer: String) {
    let Received { service, action, params, dry_run } = *received;
    let call = Call {
        service: service.to_owned(),
        action: action.to_owned(),
        params: params.clone(),
        dry_run,
        answer,
        made: None,
        at: now(),
    };
    ctx.state().record(call);
}

/// Returns the id of the resource that a call created.
fn made(action: &str, inside: &xml::Xml) -> Option<String> {
    let name = match action {
        "CreateVolume" => "volumeId",
        "CopySnapshot" | "CreateSnapshot" => "snapshotId",
        "RegisterImage" => "imageId",
        _ => return None,
    };
    inside.first(name).map(str::to_owned)
}

async fn metadata(
    ctx: &Rc<Ctx>,
    method: &str,
    path: &str,
    headers: &Head,
    builder: &Builder,
) -> std::result::Result<Answer, Dropped> {
    let name = format!("{method} {path}");
    let fault = spoil(ctx, &name, false);
    let (action, params) = (&name, &BTreeMap::new());
    let received = Received { service: "imds", action, params, dry_run: false };
    let told = |how| record(ctx, &received, how);
    if let Some(answer) = before(&fault, told).await? {
        return Ok(answer);
    }
    let (status, body) = {
        let given = Headers {
            ttl: headers.get(imds::TTL),
            token: headers.get("x-aws-ec2-metadata-token"),
            forwarded: headers.get("x-forwarded-for").is_some(),
        };
        let state = ctx.state();
        ctx.imds.borrow_mut().answer(method, path, &given, builder, &state.options)
    };
    record(ctx, &received, status.to_string());
    let mut answer = answer(status, "text/plain", body);
    if let (200, "PUT", Some(ttl)) = (status, method, headers.get(imds::TTL)) {
        // Without this header, the SDKs reject the token.
        answer.headers.push((imds::TTL, ttl.to_owned()));
    }
    after(&fault, answer).await
}

async fn ssm(ctx: &Rc<Ctx>, action: &str, body: &[u8]) -> std::result::Result<Answer, Dropped> {
    let kind = "application/x-amz-json-1.1";
    let fault = spoil(ctx, &format!("ssm:{action}"), false);
    let params: BTreeMap<String, String> =
        serde_json::from_slice::<BTreeMap<String, serde_json::Value>>(body)
            .unwrap_or_default()
            .into_iter()
            .map(|(name, value)| (name, value.as_str().map_or_else(|| value.to_string(), str::to_owned)))
            .collect();
    let received = Received { service: "ssm", action, params: &params, dry_run: false };
    let told = |how| record(ctx, &received, how);
    if let Some(answer) = before(&fault, told).await? {
        return Ok(answer);
    }
    let planned = fault.as_ref().and_then(What::refusal);
    let result = planned.map_or_else(|| others::ssm(action, body, &ctx.state().options), Err);
    let (status, told, body) = match result {
        Ok(value) => (200, "200".to_owned(), value.to_string()),
        Err(refusal) => (refusal.status, refusal.code.clone(), others::ssm_error(&refusal)),
    };
    record(ctx, &received, told);
    after(&fault, answer(status, kind, body)).await
}

/// Returns the service to which the request is addressed (`ebs`, `ec2` or `sts`), from the credential's scope.
pub fn service_of(ctx: &Ctx, headers: &Head) -> Result<String> {
    let Some(authorization) = headers.get("authorization") else {
        no!("MissingAuthenticationToken", "Request is missing Authentication Token")
    };
    // An example: AWS4-HMAC-SHA256 Credential=KEY/20260102/us-east-1/ec2/aws4_request, …
    let scope =
        authorization.split_once("Credential=").map_or("", |(_, rest)| rest.split(',').next().unwrap_or(""));
    match scope.split('/').collect::<Vec<_>>()[..] {
        [key, _, region, service @ ("ebs" | "ec2" | "sts"), "aws4_request"]
            if authorization.starts_with("AWS4-HMAC-SHA256 ") =>
        {
            is_in_time(ctx, headers, key)?;
            if service != "sts" && region != ctx.state().options.region {
                no!("AuthFailure", "Credential should be scoped to a valid region, not {region}");
            }
            Ok(service.to_owned())
        }
        _ => no!("AuthFailure", "AWS was not able to validate the provided access credentials"),
    }
}

/// Fails if a signature is older than five minutes, or if the key has signed too many calls.
fn is_in_time(ctx: &Ctx, headers: &Head, key: &str) -> Result<()> {
    let mut state = ctx.state();
    let date = headers.get("x-amz-date");
    let signed = date.and_then(clock::signed_at).unwrap_or((now() / 1000) as i64);
    if clock::seconds(&state.options).abs_diff(signed) > clock::TOLERANCE {
        no!("RequestExpired", "Request has expired. Timestamp date is {}.", date.unwrap_or_default());
    }
    let most = state.options.calls_per_key;
    let calls = state.signed.entry(key.to_owned()).or_default();
    *calls += 1;
    if most.is_some_and(|most| *calls > most) {
        no!("ExpiredToken", "The security token included in the request is expired");
    }
    Ok(())
}

async fn query(ctx: &Rc<Ctx>, headers: &Head, body: &[u8]) -> std::result::Result<Answer, Dropped> {
    let request = oven::ids::RunId::new().0;
    // EC2 puts the request's id into the body and into a header.
    let told_so = |status: u16, body: String| Answer {
        headers: vec![("x-amzn-requestid", request.clone())],
        ..answer(status, "text/xml;charset=UTF-8", body)
    };
    let no_such =
        |refusal: &Refusal| told_so(refusal.status, xml::error(&refusal.code, &refusal.message, &request));
    let (action, mut params, service) = match parse(ctx, headers, body) {
        Ok(parsed) => parsed,
        Err(refusal) => {
            // The call is recorded as far as it can be parsed.
            let mut params = Params::parse(body).unwrap_or_default();
            params.text("Version");
            let action = params.text("Action").unwrap_or_else(|| String::from_utf8_lossy(body).into_owned());
            let params = params.fields();
            let received = Received { service: "ec2", action: &action, params, dry_run: false };
            record(ctx, &received, refusal.code.clone());
            return Ok(no_such(&refusal));
        }
    };
    let given = params.fields().clone();
    if service == "sts" {
        let result = others::sts(&action, params, &ctx.state().options);
        let received = Received { service: "sts", action: &action, params: &given, dry_run: false };
        record(ctx, &received, "200".into());
        return Ok(match result {
            Ok(body) => answer(200, "text/xml", body),
            Err(refusal) => no_such(&refusal),
        });
    }
    let dry_run = match params.boolean("DryRun") {
        Ok(dry_run) => dry_run.unwrap_or(false),
        Err(refusal) => return Ok(no_such(&refusal)),
    };
    let fault = spoil(ctx, &action, dry_run);
    let after_effect = match &fault {
        Some(What::ErrorAfter(code)) => Some(refuse(code, "It was planned so, after the effect.")),
        _ => None,
    };
    let wait = ctx.state().latency(&action);
    sleep(wait).await;
    let received = Received { service: "ec2", action: &action, params: &given, dry_run };
    let told = |how| record(ctx, &received, how);
    if let Some(answer) = before(&fault, told).await? {
        return Ok(answer);
    }
    let throttled = {
        let narrow = ["Filter.1.Name", "MaxResults", "Owner.1"];
        let unfiltered = !given.keys().any(|name| narrow.contains(&name.as_str()) || name.ends_with("Id.1"));
        let mut state = ctx.state();
        let throttle = state.options.throttle;
        throttle.is_some_and(|throttle| !state.buckets.take(&action, &throttle, unfiltered, Instant::now()))
    };
    let result = if throttled {
        Err(refuse("RequestLimitExceeded", "Request limit exceeded."))
    } else if let Some(refusal) = fault.as_ref().and_then(What::refusal) {
        Err(refusal)
    } else {
        let turn = if let Some(What::Turns(turn)) = fault { Some(turn) } else { None };
        let ask = Ask { action: action.clone(), params, dry_run, turn };
        ctx.state().at_work += 1;
        let result = actions::perform(ctx, ask, fault == Some(What::Stale)).await;
        ctx.state().at_work -= 1;
        if !crate::faults::is_reading(&action) && result.is_ok() {
            ctx.save();
        }
        result
    };
    let told = match (&result, &fault) {
        (Ok(_), None) => "200".to_owned(),
        (Ok(_), Some(_)) => format!("200 {}", fault_name(&fault)),
        (Err(refusal), _) => refusal.code.clone(),
    };
    let new = result.as_ref().ok().and_then(|inside| made(&action, inside));
    let (service, params) = ("ec2".to_owned(), given);
    let call = Call { service, action: action.clone(), params, dry_run, answer: told, made: new, at: now() };
    ctx.state().record(call);
    let made = match (result, after_effect) {
        (Ok(_), Some(lost)) => no_such(&lost),
        (Ok(inside), None) => told_so(200, inside.answer(&action, &request)),
        (Err(refusal), _) => no_such(&refusal),
    };
    after(&fault, made).await
}

fn parse(ctx: &Ctx, headers: &Head, body: &[u8]) -> Result<(String, Params, String)> {
    let service = service_of(ctx, headers)?;
    if service == "ebs" {
        no!("AuthFailure", "AWS was not able to validate the provided access credentials");
    }
    let mut params = Params::parse(body)?;
    let (action, version) = (params.required("Action")?, params.required("Version")?);
    if service == "ec2" && version != VERSION {
        no!("NoSuchVersion", "The requested version ({version}) of service AmazonEC2 does not exist");
    }
    if service == "ec2" && !actions::is_known(&action) {
        no!("InvalidAction", "The action {action} is not valid for this web service.");
    }
    Ok((action, params, service))
}

/// Counts this call, and returns the fault that is planned for it.
pub fn spoil(ctx: &Ctx, action: &str, dry_run: bool) -> Option<What> {
    let state = &mut *ctx.state();
    state.plan.next(&state.options.faults, action, dry_run)
}

pub fn fault_name(fault: &Option<What>) -> String {
    fault.as_ref().map_or_else(String::new, |what| format!("{what:?}"))
}

fn plain(status: u16) -> Answer {
    answer(status, "text/html", format!("<html><body><h1>{status}</h1></body></html>"))
}

/// Applies a fault before the call takes effect. Returns `Ok(None)` if the call continues. `told` records a fault that
/// ends the call.
pub async fn before(
    fault: &Option<What>,
    told: impl FnOnce(String),
) -> std::result::Result<Option<Answer>, Dropped> {
    if let Some(What::StatusBefore(_) | What::DropBefore | What::HangBefore) = fault {
        told(fault_name(fault));
    }
    match fault {
        Some(What::StatusBefore(status)) => Ok(Some(plain(*status))),
        Some(What::DropBefore) => Err(Dropped),
        Some(What::HangBefore) => std::future::pending().await,
        Some(What::Late(ms)) => {
            sleep(Duration::from_millis(*ms)).await;
            Ok(None)
        }
        _ => Ok(None),
    }
}

/// Applies a fault to the response, after the call took effect.
pub async fn after(fault: &Option<What>, answer: Answer) -> std::result::Result<Answer, Dropped> {
    match fault {
        Some(What::StatusAfter(status)) => Ok(plain(*status)),
        Some(What::DropAfter) => Err(Dropped),
        Some(What::HangAfter) => std::future::pending().await,
        _ => Ok(answer),
    }
}
