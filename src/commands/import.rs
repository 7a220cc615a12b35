//! `oven import`.

use super::answer;
use crate::cli::{self, Global};
use crate::cloud::Architecture;
use crate::error::{Kind, SUCCESS};
use crate::report::Report;
use crate::site::Site;
use anyhow::Result;
use serde_json::json;
use tokio::sync::watch;

pub async fn run(
    global: &Global,
    args: &cli::Import,
    report: &Report,
    mut stop: watch::Receiver<bool>,
) -> Result<u8> {
    let architecture = match args.arch.as_deref() {
        None => Architecture::HOST,
        Some("x86_64" | "amd64") => Architecture::X86_64,
        Some("arm64" | "aarch64") => Architecture::Arm64,
        Some(other) => {
            let message = format!("--arch: unknown architecture `{other}`");
            return Err(Kind::Usage.failure(message).hint("Give x86_64 or arm64.").into());
        }
    };
    let site = Site::of(global, &[], report.clone())?;
    let image = tokio::select! {
        image = site.import(&args.raw, &args.name, architecture) => image,
        _ = stop.wait_for(|stop| *stop) => Err(Kind::Interrupted.error("interrupted")),
    };
    let image = image?;
    report.event(json!({"event": "result", "ami_id": image.id, "ami_name": image.name}));
    if !global.json {
        answer(&image.id);
    }
    Ok(SUCCESS)
}
