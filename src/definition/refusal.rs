//! Finds the key of image.toml that a plugin refuses. Refusals begin with the key, such as `` packages: `curl`: … ``.

use super::{Definition, PackageRequest};
use crate::error::Place;
use std::path::Path;

impl Definition {
    /// The place of the key that a refusal is about; `None` if the refusal does not begin with a key. The place's text
    /// is only the file and the line, because the refusal has the key.
    pub fn place_of_refusal(&self, refusal: &str) -> Option<Place> {
        let key = ["[[repository]]", "packages", "hold", "debconf"].into_iter().find(|key| {
            let rest = refusal.strip_prefix(key);
            rest.is_some_and(|rest| rest.starts_with(':') || key.starts_with('[') && rest.starts_with(' '))
        })?;
        let rest = refusal[key.len()..].trim_start_matches([':', ' ']);
        // The first words in backquotes: the name of the repository or of the package, and then perhaps a key.
        let mut quoted = rest.split('`').skip(1).step_by(2);
        let name = quoted.next().filter(|_| rest.starts_with('`'));
        let place = match (key, name) {
            ("[[repository]]", Some(name)) => {
                let index = self.repositories.iter().position(|repository| repository.name == name)?;
                let named = rest[name.len() + 2..].trim_start_matches([':', ' ']).starts_with('`');
                let known = ["url", "key", "signed", "suite", "components", "keep", "priority"];
                let key = quoted.next().filter(|key| named && known.contains(key)).unwrap_or("name");
                self.place(&format!("repository[{index}].{key}"), None)
            }
            ("[[repository]]", None) => self.place("repository", None),
            ("packages", Some(name)) => match self.packages.iter().position(|asked| is_spelt(asked, name)) {
                Some(index) => self.place(&format!("packages[{index}]"), None),
                None => self.place("packages", None),
            },
            (key, name) => self.place(key, name),
        };
        Some(Place::new(place.file, place.line, place.key, ""))
    }
}

/// Whether a plugin spells a package like this.
fn is_spelt(asked: &PackageRequest, spelt: &str) -> bool {
    let is_file = |path: &Path, name: &str| {
        name == spelt || path.file_name().is_some_and(|file| file.to_str() == Some(spelt))
    };
    match asked {
        PackageRequest::Named { name, version, suite } => {
            let part = |mark: char, text: &Option<String>| {
                text.as_ref().map(|text| format!("{mark}{text}")).unwrap_or_default()
            };
            let suite = part('/', suite);
            spelt == name
                || spelt == format!("{name}{suite}")
                || spelt == format!("{name}{suite}{}", part('=', version))
        }
        PackageRequest::Group { name } => spelt.strip_prefix('@') == Some(name),
        PackageRequest::File { source, package } => is_file(source, &package.name),
        PackageRequest::Url { url, file, .. } => {
            let name = file.as_ref().map(|file| file.package.name.as_str()).unwrap_or_default();
            is_file(Path::new(url), name)
        }
    }
}
