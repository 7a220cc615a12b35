//! Decides whether an image that already has the wanted name is the result of the same bake by another builder.

use super::{Image, ImageSpec, ImageState, tag};
use crate::error::Kind;
use anyhow::Error;

/// What to do about the image that already has the name.
#[derive(Debug)]
pub enum ConflictResolution {
    /// The image is the result of the same bake. Use it.
    Adopt,
    /// The image is the result of the same bake, but it is still pending. Wait for it.
    Wait,
    /// The image has another content, has failed, or is incomplete. The error gives the reason.
    Refuse(Error),
}

/// Decides what to do about `holder`, the image that has the name of `spec`. If two builders register the same name,
/// EC2 rejects one of them. If oven then registered the image under another name, the same bake would have two images.
/// So oven never does that.
pub fn resolve_conflict(holder: &Image, spec: &ImageSpec) -> ConflictResolution {
    let (id, name) = (&holder.id, &spec.name);
    let same = |key: &str| holder.tags.get(key).is_some_and(|theirs| spec.tags.get(key) == Some(theirs));
    let ours = holder.tags.contains_key(tag::RUN);
    // An imported image is identified by its disk, and a baked image by its definition and base.
    let imported = spec.tags.contains_key(tag::SOURCE);
    let same_source =
        if imported { same(tag::SOURCE) } else { same(tag::FINGERPRINT) && same(tag::CHECKSUM) };
    let rename = if imported { "give another --name" } else { "change the definition's name" };
    let broken = match holder.state {
        ImageState::Failed => "has failed",
        _ if ours && !has_identity_tags(holder) => "is incomplete, because it lacks oven's tags",
        _ if !same_source || holder.architecture != spec.architecture => {
            let text = format!("the name {name} is used by {id}, which is another image");
            let hint = format!(
                "`oven images show {id}` describes it. Remove it (`oven images remove {id}`; in AWS, `aws ec2 \
                 deregister-image --image-id {id}`), or {rename}."
            );
            return ConflictResolution::Refuse(Kind::Cloud.failure(text).hint(hint).into());
        }
        ImageState::Pending => return ConflictResolution::Wait,
        ImageState::Available => return ConflictResolution::Adopt,
    };
    let text = format!("the name {name} is used by {id}, which {broken}");
    let hint = if imported {
        format!("Deregister {id}, or give another --name.")
    } else if ours {
        "Bake again with --replace-failed, which deregisters it first.".to_owned()
    } else {
        format!("Deregister {id} yourself, because oven did not create it.")
    };
    ConflictResolution::Refuse(Kind::Cloud.failure(text).hint(hint).into())
}

/// Returns whether the image has the tags that identify its inputs.
fn has_identity_tags(image: &Image) -> bool {
    let has = |key: &str| image.tags.contains_key(key);
    has(tag::FINGERPRINT) && has(tag::CHECKSUM) || has(tag::SOURCE)
}

/// Returns whether `--replace-failed` may deregister an image. A run of oven must have created the image, and the image
/// must have failed or be incomplete.
pub fn is_replaceable(image: &Image) -> bool {
    image.tags.contains_key(tag::RUN) && (image.state == ImageState::Failed || !has_identity_tags(image))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cloud::Tags;
    use crate::error::hint_of;
    use crate::ids::{Architecture, ImageId, RunId, SnapshotId};

    fn tags(pairs: &[(&str, &str)]) -> Tags {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    const WHOLE: [(&str, &str); 3] = [(tag::RUN, "r"), (tag::FINGERPRINT, "f"), (tag::CHECKSUM, "c")];

    fn verdict(state: ImageState, theirs: &[(&str, &str)]) -> (String, bool) {
        verdict_on(state, theirs, &WHOLE)
    }

    fn verdict_on(state: ImageState, theirs: &[(&str, &str)], wanted: &[(&str, &str)]) -> (String, bool) {
        let image = Image {
            id: ImageId("ami-1".into()),
            name: "web".into(),
            state,
            architecture: Architecture::X86_64,
            snapshot: SnapshotId("snap-1".into()),
            size_gib: 1,
            created: String::new(),
            description: String::new(),
            tags: tags(theirs),
        };
        let spec = ImageSpec {
            name: "web".into(),
            description: String::new(),
            architecture: Architecture::X86_64,
            root_device: "/dev/xvda".into(),
            size_gib: 1,
            attributes: Default::default(),
            tags: tags(wanted),
            run: RunId("s".into()),
            documents: Default::default(),
        };
        let text = match resolve_conflict(&image, &spec) {
            ConflictResolution::Adopt => "adopt".into(),
            ConflictResolution::Wait => "wait".into(),
            ConflictResolution::Refuse(error) => format!("{error} | {}", hint_of(&error).unwrap()),
        };
        (text, is_replaceable(&image))
    }

    #[test]
    fn an_imported_image_is_identified_by_its_disk() {
        use ImageState::{Available, Failed, Pending};
        let (ours, other) = ([(tag::RUN, "r"), (tag::SOURCE, "d")], [(tag::RUN, "r"), (tag::SOURCE, "e")]);
        for (state, theirs, expected, replaceable) in [
            (Available, &ours[..], "adopt", false),
            (Pending, &ours, "wait", false),
            (Failed, &ours, "another --name", true),
            (Available, &other, "another --name", false),
            (Available, &WHOLE, "used by ami-1", false),
            (Available, &[], "used by ami-1", false),
        ] {
            let (text, may) = verdict_on(state, theirs, &ours);
            assert!(text.contains(expected), "{state:?} {theirs:?}: {text}");
            assert_eq!(may, replaceable, "{state:?} {theirs:?}");
        }
        // A bake does not adopt an imported image.
        let (text, may) = verdict(Available, &ours);
        assert!(text.contains("used by ami-1") && !may, "{text}");
    }

    #[test]
    fn verdicts() {
        use ImageState::{Available, Failed, Pending};
        let other = [(tag::RUN, "r"), (tag::FINGERPRINT, "g"), (tag::CHECKSUM, "c")];
        let partial = [(tag::RUN, "r"), (tag::CHECKSUM, "c")];
        for (state, theirs, expected, replaceable) in [
            (Available, &WHOLE[..], "adopt", false),
            (Pending, &WHOLE, "wait", false),
            (Failed, &WHOLE, "--replace-failed", true),
            (Failed, &[], "yourself", false),
            (Available, &partial, "--replace-failed", true),
            (Available, &other, "used by ami-1", false),
            (Pending, &other, "used by ami-1", false),
            (Available, &[], "used by ami-1", false),
        ] {
            let (text, may) = verdict(state, theirs);
            assert!(text.contains(expected), "{state:?} {theirs:?}: {text}");
            assert_eq!(may, replaceable, "{state:?} {theirs:?}");
        }
    }
}
