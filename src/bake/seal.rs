//! The end of step 4: cleans and checks the provisioned root file system.

use crate::provision::command::CommandRunner;
use crate::seal::{self, Baseline};
use anyhow::Result;

/// Records the state of the image before anything is changed in it.
pub fn baseline(runner: &CommandRunner<'_>) -> Result<Baseline> {
    let _activity = runner.work.report.activity("baseline", "reading the base image");
    Baseline::take(runner).map_err(|error| runner.work.explain_base(&runner.place, error))
}

/// Cleans the image, then checks it.
pub async fn image(runner: &CommandRunner<'_>, baseline: Baseline) -> Result<()> {
    seal::image(runner, baseline).await.map_err(|error| runner.work.explain(&runner.place, error))
}
