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
    /// The image's tags name the run (the execution of a bake) that created it. If it is not the run `run`, another
    /// builder registered the image first.
    pub(crate) fn of(image: Image, run: &RunId) -> Self {
        if image.was_created_by(run) { Self::Baked(image) } else { Self::AlreadyBaked(image) }
    }

    pub fn image(&self) -> &Image {
        match self {
            Self::Baked(image) | Self::AlreadyBaked(image) => image,
        }
    }
}
