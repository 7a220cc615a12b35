//! Small systems with real package managers, and packages for them.

pub mod mirror;
pub mod overlay;
pub mod package_lab;
pub mod rpm_lab;
pub mod rpm_packages;

use anyhow::Error;
use oven::bake::{provision, seal};
use oven::provision::command::CommandRunner;
use oven::provision::context::{MountedImage, ProvisionContext};
use std::collections::BTreeMap;

/// The result of a bake in a lab.
pub struct LabBake {
    pub result: Result<BTreeMap<String, String>, Error>,
    /// The log with every line, warning and note.
    pub log: String,
}

impl LabBake {
    #[track_caller]
    pub fn facts(self) -> BTreeMap<String, String> {
        match self.result {
            Ok(facts) => facts,
            Err(error) => panic!("{error:#}\n{}", self.log),
        }
    }

    /// Returns the exit code of the failure, and its text with the hint.
    #[track_caller]
    pub fn failure(&self) -> (u8, String) {
        match &self.result {
            Ok(_) => panic!("the bake succeeded:\n{}", self.log),
            Err(error) => {
                let hint = oven::error::hint_of(error).unwrap_or_default();
                (oven::error::Kind::of(error) as u8, format!("{error:#}\n{hint}"))
            }
        }
    }

    /// Fails unless the bake failed with this code and with all of these words.
    #[track_caller]
    pub fn fails(&self, code: u8, words: &[&str]) {
        let (found, text) = self.failure();
        assert_eq!(found, code, "{text}");
        for word in words {
            assert!(text.contains(word), "{word:?} is not in: {text}");
        }
    }
}

/// Provisions and seals a mounted root, as a bake does. Returns the plan's facts.
pub async fn provision_and_seal(
    place: &MountedImage<'_>,
    work: &ProvisionContext<'_>,
) -> Result<BTreeMap<String, String>, Error> {
    let runner = CommandRunner::new(place, work).map_err(|error| work.explain(place, error))?;
    let mut baseline = seal::baseline(&runner)?;
    let facts = provision::packages_and_scripts(&runner, &mut baseline).await?;
    seal::image(&runner, baseline).await?;
    Ok(facts)
}
