//! Parses a request to EBS. The method and path determine the action. Its members come from the path, the query, the
//! headers and the body.

use super::invalid;
use crate::refusal::{Refusal, Result, refuse};
use crate::wire::Request;
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// The members of a request. Numbers and strings are stored as text, and other values as JSON.
#[derive(Debug, Clone, Default)]
pub struct Members(BTreeMap<String, String>);

const OF_BODY: [&str; 8] = [
    "ClientToken",
    "Description",
    "Encrypted",
    "KmsKeyArn",
    "ParentSnapshotId",
    "Tags",
    "Timeout",
    "VolumeSize",
];

/// The members of an action that are in the query, and those that are in the headers.
type Places = (&'static [(&'static str, &'static str)], &'static [(&'static str, &'static str)]);

fn places(action: &str) -> Places {
    const PAGES: [(&str, &str); 3] = [
        ("pageToken", "NextToken"),
        ("maxResults", "MaxResults"),
        ("startingBlockIndex", "StartingBlockIndex"),
    ];
    const CHANGED: [(&str, &str); 4] = [PAGES[0], PAGES[1], PAGES[2], ("firstSnapshotId", "FirstSnapshotId")];
    match action {
        "CompleteSnapshot" => (
            &[],
            &[
                ("x-amz-changedblockscount", "ChangedBlocksCount"),
                ("x-amz-checksum", "Checksum"),
                ("x-amz-checksum-algorithm", "ChecksumAlgorithm"),
                ("x-amz-checksum-aggregation-method", "ChecksumAggregationMethod"),
            ],
        ),
        "GetSnapshotBlock" => (&[("blockToken", "BlockToken")], &[]),
        "ListChangedBlocks" => (&CHANGED, &[]),
        "ListSnapshotBlocks" => (&PAGES, &[]),
        "PutSnapshotBlock" => (
            &[],
            &[
                ("x-amz-data-length", "DataLength"),
                ("x-amz-progress", "Progress"),
                ("x-amz-checksum", "Checksum"),
                ("x-amz-checksum-algorithm", "ChecksumAlgorithm"),
            ],
        ),
        _ => (&[], &[]),
    }
}

/// Returns the action of a method and a path, and the members in the path.
fn route(method: &str, path: &str) -> Option<(&'static str, Vec<(&'static str, String)>)> {
    let parts: Vec<String> = path.split('/').skip(1).map(unescaped).collect();
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    let id = |id: &str| ("SnapshotId", id.to_owned());
    Some(match (method, &parts[..]) {
        ("POST", ["snapshots"]) => ("StartSnapshot", Vec::new()),
        ("POST", ["snapshots", "completion", snapshot]) => ("CompleteSnapshot", vec![id(snapshot)]),
        ("GET", ["snapshots", snapshot, "blocks"]) => ("ListSnapshotBlocks", vec![id(snapshot)]),
        ("GET", ["snapshots", snapshot, "changedblocks"]) => {
            ("ListChangedBlocks", vec![("SecondSnapshotId", (*snapshot).to_owned())])
        }
        ("GET", ["snapshots", snapshot, "blocks", index]) => {
            ("GetSnapshotBlock", vec![id(snapshot), ("BlockIndex", (*index).to_owned())])
        }
        ("PUT", ["snapshots", snapshot, "blocks", index]) => {
            ("PutSnapshotBlock", vec![id(snapshot), ("BlockIndex", (*index).to_owned())])
        }
        _ => return None,
    })
}

fn unescaped(part: &str) -> String {
    // In a path, a plus does not stand for a blank.
    let part = part.replace('+', "%2B");
    form_urlencoded::parse(part.as_bytes()).next().map_or_else(String::new, |(name, _)| name.into_owned())
}

/// Returns the action and the members of a request. An error contains the action, if it is known.
pub fn read(request: &Request) -> std::result::Result<(&'static str, Members), (&'static str, Refusal)> {
    let Some((action, in_path)) = route(&request.method, &request.path) else {
        let text = format!("There is no {} {}", request.method, request.path);
        return Err(("", refuse("UnknownOperationException", text)));
    };
    members(request, action, in_path).map(|members| (action, members)).map_err(|refusal| (action, refusal))
}

fn members(request: &Request, action: &str, in_path: Vec<(&'static str, String)>) -> Result<Members> {
    let mut fields: BTreeMap<String, String> =
        in_path.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let (of_query, of_headers) = places(action);
    for (name, value) in form_urlencoded::parse(request.query.as_bytes()) {
        let member = of_query.iter().find(|(place, _)| *place == name);
        let Some((_, member)) = member else {
            return Err(invalid("INVALID_PARAMETER_VALUE", format!("The parameter {name} is not known.")));
        };
        if fields.insert((*member).to_owned(), value.into_owned()).is_some() {
            return Err(invalid("INVALID_PARAMETER_VALUE", format!("The parameter {name} is given twice.")));
        }
    }
    for (place, member) in of_headers {
        if let Some(value) = request.headers.get(place) {
            fields.insert((*member).to_owned(), value.trim().to_owned());
        }
    }
    if action == "StartSnapshot" {
        let body: Map<String, Value> = serde_json::from_slice(&request.body)
            .map_err(|e| refuse("SerializationException", format!("the body is no JSON object: {e}")))?;
        for (name, value) in body {
            if !OF_BODY.contains(&name.as_str()) {
                return Err(invalid("INVALID_PARAMETER_VALUE", format!("The member {name} is not known.")));
            }
            match value {
                Value::Null => continue,
                Value::String(text) => fields.insert(name, text),
                other => fields.insert(name, other.to_string()),
            };
        }
    }
    Ok(Members(fields))
}

impl Members {
    pub fn fields(&self) -> &BTreeMap<String, String> {
        &self.0
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    pub fn required(&self, name: &str) -> Result<&str> {
        let missing = || invalid("INVALID_PARAMETER_VALUE", format!("{name} is missing."));
        self.get(name).filter(|value| !value.is_empty()).ok_or_else(missing)
    }

    /// Returns a number between `least` and `most`.
    pub fn number(&self, name: &str, least: u32, most: u32) -> Result<Option<u32>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.parse() {
            Ok(number) if (least..=most).contains(&number) => Ok(Some(number)),
            _ => {
                let text = format!("{name} is {value}, and has to be a number from {least} to {most}.");
                Err(invalid("INVALID_PARAMETER_VALUE", text))
            }
        }
    }

    pub fn index(&self) -> Result<u32> {
        self.required("BlockIndex")?;
        Ok(self.number("BlockIndex", 0, i32::MAX as u32)?.unwrap_or_default())
    }

    /// Fails if the member has a value other than `only`, the one value that EBS allows.
    pub fn is_only(&self, name: &str, only: &str) -> Result<()> {
        match self.get(name) {
            Some(value) if value != only => {
                let text = format!("{name} is '{value}', and only '{only}' is known.");
                Err(invalid("INVALID_PARAMETER_VALUE", text))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes() {
        let at = |method, path| route(method, path).map(|(action, _)| action);
        assert_eq!(at("POST", "/snapshots"), Some("StartSnapshot"));
        assert_eq!(at("GET", "/snapshots"), None);
        assert_eq!(at("POST", "/snapshots/completion/snap-0"), Some("CompleteSnapshot"));
        assert_eq!(at("GET", "/snapshots/snap-0/blocks"), Some("ListSnapshotBlocks"));
        assert_eq!(at("GET", "/snapshots/snap-0/changedblocks"), Some("ListChangedBlocks"));
        let (action, members) = route("PUT", "/snapshots/snap%2D0/blocks/7").unwrap();
        assert_eq!(action, "PutSnapshotBlock");
        assert_eq!(members, [("SnapshotId", "snap-0".to_owned()), ("BlockIndex", "7".to_owned())]);
        assert_eq!(at("DELETE", "/snapshots/snap-0/blocks/7"), None);
    }
}
