//! The result of a successful bake.

use crate::cloud::Image;
use crate::ids::RunId;

/// The result of a successful bake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Baked(Image),
    /// An image with this fingerprint existed already, or another builder registered it first.
    AlreadyBaked(Image),
}

impl Outcome {
    /// The image has the id of the run that created it. This shows whether this run baked it.
    pub(crate) fn of(image: Image, run: &RunId) -> Self {
        if image.was_created_by(run) { Self::Baked(image) } else { Self::AlreadyBaked(image) }
    }

    pub fn image(&self) -> &Image {
        match self {
            Self::Baked(image) | Self::AlreadyBaked(image) => image,
        }
    }
}
