//! Checks the name of the imported image, which another image may already have.

use super::Import;
use crate::cloud::{BaseRef, Image};
use crate::error::Kind;
use crate::ids::ImageId;
use anyhow::{Error, Result};

/// Returns the image that already has the wanted name. Images that oven did not create are ignored.
pub async fn holder(import: &Import<'_>) -> Result<Option<Image>> {
    let images = import.site.cloud.images(None).await?;
    Ok(images.into_iter().find(|image| image.name == import.wanted.name))
}

/// Fails if an image that oven did not create has the wanted name. This is checked before the upload. Errors:
/// [`Kind::Cloud`].
pub async fn ensure_free(import: &Import<'_>) -> Result<()> {
    let name = &import.wanted.name;
    // EC2 reads the name as a pattern. This is safe, because an image name cannot contain wildcards.
    let named = BaseRef::Name { name: name.to_owned(), owner: Some("self".to_owned()) };
    match import.site.cloud.base(&BaseRef::Deprecated(named.into())).await {
        Ok(base) => {
            let error = Kind::Cloud.error(format!("the name {name} is already used by {}", base.id));
            Err(with_name_hint(import, error, &base.id))
        }
        Err(error) if Kind::of(&error) == Kind::NotFound => Ok(()),
        // This error means that the image exists, but cannot be used as a base.
        Err(error) if Kind::of(&error) == Kind::Definition => {
            let text = format!("the name {name} is already used: {error:#}");
            Err(Kind::Cloud.failure(text).hint("Choose another --name.").into())
        }
        Err(error) => Err(error),
    }
}

/// Adds a hint to the cloud's error if another image has the name.
pub fn explain_conflict(import: &Import<'_>, holder: Option<&Image>, error: Error) -> Error {
    match holder {
        Some(holder) if Kind::of(&error) == Kind::Cloud => with_name_hint(import, error, &holder.id),
        _ => error,
    }
}

/// Adds a hint to the error: how the user can proceed if another image has the name.
fn with_name_hint(import: &Import<'_>, error: Error, holder: &ImageId) -> Error {
    let site = import.site;
    let remove = site.command_for_site(&site.cloud.removal_command(holder));
    let hint = format!(
        "The image with this name was made from another disk. Choose another --name, or remove that image: {remove}"
    );
    Kind::Cloud.failure(format!("{error:#}")).hint(hint).into()
}
