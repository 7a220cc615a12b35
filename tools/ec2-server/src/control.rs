//! The interface below `/_oven/` for tests in another process.

use crate::actions::Ctx;
use crate::attach;
use crate::ledger::Ledger;
use crate::world::now;
use serde_json::{Value, json};
use std::rc::Rc;

/// ```text
/// GET  ledger                    returns the resources
/// GET  calls                     returns the calls
/// POST options  {"faults": [..], "delays": {..}, "latencies": {..}, "direct": {..}, "denied": [..], "parameters": {..}, "visibility_lag": MS}
/// POST snapshot {"id": ID, "owner": "..", "public": true, "shared": true, "encrypted": true, "key": ".."}   changes a snapshot
/// POST pull     {"volume": ID}   removes a disk from its instance without the API
/// ```
pub async fn answer(ctx: &Rc<Ctx>, method: &str, path: &str, body: &[u8]) -> (u16, String) {
    let given: Value = serde_json::from_slice(body).unwrap_or(Value::Null);
    let result = match (method, path) {
        ("GET", "ledger") => match ctx.import().await {
            Ok(()) => serde_json::to_value(Ledger::of(&ctx.state().world, ctx.region.dir(), now()))
                .map_err(Into::into),
            Err(refusal) => return (500, json!({"error": refusal.message}).to_string()),
        },
        ("GET", "calls") => serde_json::to_value(&ctx.state().calls).map_err(Into::into),
        ("POST", "options") => set(ctx, given).map(|()| json!({})),
        ("POST", "snapshot") => snapshot(ctx, &given).map(|()| json!({})),
        ("POST", "pull") => {
            attach::pull(ctx, given["volume"].as_str().unwrap_or_default()).await.map(|()| json!({}))
        }
        _ => {
            return (404, json!({"error": "there is ledger, calls, options, snapshot and pull"}).to_string());
        }
    };
    match result {
        Ok(value) => (200, value.to_string()),
        Err(error) => (400, json!({"error": format!("{error:#}")}).to_string()),
    }
}

/// Changes a snapshot's owner, visibility or encryption.
fn snapshot(ctx: &Ctx, given: &Value) -> anyhow::Result<()> {
    let mut state = ctx.state();
    let id = given["id"].as_str().unwrap_or_default();
    let snapshot =
        state.world.snapshots.get_mut(id).ok_or_else(|| anyhow::anyhow!("there is no snapshot {id}"))?;
    if let Some(owner) = given["owner"].as_str() {
        owner.clone_into(&mut snapshot.common.owner);
    }
    snapshot.public = given["public"].as_bool().unwrap_or(snapshot.public);
    snapshot.shared = given["shared"].as_bool().unwrap_or(snapshot.shared);
    snapshot.encrypted = given["encrypted"].as_bool().unwrap_or(snapshot.encrypted);
    if let Some(key) = given["key"].as_str() {
        snapshot.key = Some(key.to_owned());
    }
    Ok(())
}

fn set(ctx: &Ctx, given: Value) -> anyhow::Result<()> {
    let Value::Object(given) = given else { anyhow::bail!("the body is no JSON object") };
    let mut state = ctx.state();
    for (name, value) in given {
        let options = &mut state.options;
        match name.as_str() {
            "faults" => {
                options.faults = serde_json::from_value(value)?;
                // With a new plan, calls are counted from 0 again.
                state.plan = Default::default();
            }
            "delays" => options.delays = serde_json::from_value(value)?,
            "latencies" => options.latencies = serde_json::from_value(value)?,
            "direct" => options.direct = serde_json::from_value(value)?,
            "denied" => options.denied = serde_json::from_value(value)?,
            "policy" => options.policy = (!value.is_null()).then_some(value),
            "parameters" => options.parameters = serde_json::from_value(value)?,
            "visibility_lag" => {
                options.visibility_lag = std::time::Duration::from_millis(serde_json::from_value(value)?);
            }
            other => anyhow::bail!("there is no option {other}"),
        }
    }
    Ok(())
}
