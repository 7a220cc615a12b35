//! The parameters of a request. Each known parameter is taken, so the remaining ones are unknown.

use crate::refusal::{Result, no};
use std::collections::BTreeMap;

/// The parameters of a request, or of a structure in it.
#[derive(Debug, Clone, Default)]
pub struct Params {
    /// The prefix of a structure, such as `Filter.1.`.
    prefix: String,
    fields: BTreeMap<String, String>,
}

impl Params {
    /// Parses the body of a form.
    pub fn parse(body: &[u8]) -> Result<Self> {
        let mut fields = BTreeMap::new();
        for (name, value) in form_urlencoded::parse(body) {
            if fields.insert(name.clone().into_owned(), value.into_owned()).is_some() {
                no!("InvalidParameterCombination", "The parameter {name} is given twice");
            }
        }
        Ok(Self { prefix: String::new(), fields })
    }

    pub fn fields(&self) -> &BTreeMap<String, String> {
        &self.fields
    }

    pub fn text(&mut self, name: &str) -> Option<String> {
        self.fields.remove(name)
    }

    pub fn required(&mut self, name: &str) -> Result<String> {
        match self.text(name) {
            Some(value) if !value.is_empty() => Ok(value),
            _ => no!("MissingParameter", "The request must contain the parameter {}{name}", self.prefix),
        }
    }

    pub fn boolean(&mut self, name: &str) -> Result<Option<bool>> {
        match self.text(name).as_deref() {
            None => Ok(None),
            Some("true") => Ok(Some(true)),
            Some("false") => Ok(Some(false)),
            Some(other) => {
                no!(
                    "InvalidParameterValue",
                    "Invalid value '{other}' for {}{name}. Must be a boolean",
                    self.prefix
                )
            }
        }
    }

    pub fn integer(&mut self, name: &str) -> Result<Option<u32>> {
        let Some(value) = self.text(name) else { return Ok(None) };
        match value.parse() {
            Ok(number) => Ok(Some(number)),
            Err(_) => {
                no!(
                    "InvalidParameterValue",
                    "Invalid value '{value}' for {}{name}. Must be an integer",
                    self.prefix
                )
            }
        }
    }

    /// Takes `Name.1`, `Name.2` and so on.
    pub fn list(&mut self, name: &str) -> Result<Vec<String>> {
        let mut values = Vec::new();
        for mut item in self.items(name)? {
            match item.fields.remove("") {
                Some(value) => values.push(value),
                None => no!("InvalidParameterValue", "{} has a structure where a value belongs", item.prefix),
            }
            item.done()?;
        }
        Ok(values)
    }

    /// Takes `Name.1.Field`, `Name.2.Field` and so on.
    pub fn structures(&mut self, name: &str) -> Result<Vec<Self>> {
        let mut items = self.items(name)?;
        for item in &mut items {
            item.prefix.push('.');
            let fields = std::mem::take(&mut item.fields);
            for (field, value) in fields {
                match field.strip_prefix('.') {
                    Some(field) => item.fields.insert(field.to_owned(), value),
                    None => {
                        no!("InvalidParameterValue", "{} has a value where a structure belongs", item.prefix)
                    }
                };
            }
        }
        Ok(items)
    }

    /// Takes `Name.Field`.
    pub fn structure(&mut self, name: &str) -> Option<Self> {
        let start = format!("{name}.");
        let fields: BTreeMap<_, _> = self.taken(&start);
        (!fields.is_empty()).then(|| Self { prefix: format!("{}{start}", self.prefix), fields })
    }

    /// Fails if a parameter remains.
    pub fn done(&self) -> Result<()> {
        match self.fields.keys().next() {
            None => Ok(()),
            Some(name) => no!("UnknownParameter", "The parameter {}{name} is not recognized", self.prefix),
        }
    }

    fn taken(&mut self, start: &str) -> BTreeMap<String, String> {
        let names: Vec<String> = self.fields.keys().filter(|name| name.starts_with(start)).cloned().collect();
        let take =
            |name: String| (name[start.len()..].to_owned(), self.fields.remove(&name).unwrap_or_default());
        names.into_iter().map(take).collect()
    }

    fn items(&mut self, name: &str) -> Result<Vec<Self>> {
        let start = format!("{name}.");
        let mut items = BTreeMap::<u32, Self>::new();
        for (rest, value) in self.taken(&start) {
            let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
            let (number, field) = rest.split_at(digits);
            let Ok(number) = number.parse() else {
                no!("UnknownParameter", "The parameter {}{start}{rest} is not recognized", self.prefix)
            };
            let prefix = format!("{}{start}{number}", self.prefix);
            let item = items.entry(number).or_insert(Self { prefix, fields: BTreeMap::new() });
            item.fields.insert(field.to_owned(), value);
        }
        if items.keys().zip(1..).any(|(number, expected)| *number != expected) {
            no!("InvalidParameterValue", "The list {}{name} is not numbered from 1 on", self.prefix);
        }
        Ok(items.into_values().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(body: &str) -> Params {
        Params::parse(body.as_bytes()).unwrap()
    }

    #[test]
    fn everything_is_taken_or_refused() {
        let body = "A=x+y%26&B=true&C=7&L.2=b&L.1=a&F.1.Name=n&F.1.Value.1=v&E.Id=i&Left.1.More=1";
        let mut p = params(body);
        assert_eq!(p.required("A").unwrap(), "x y&");
        assert_eq!((p.boolean("B").unwrap(), p.integer("C").unwrap()), (Some(true), Some(7)));
        assert_eq!(p.list("L").unwrap(), ["a", "b"]);
        let mut filter = p.structures("F").unwrap().remove(0);
        assert_eq!(
            (filter.required("Name").unwrap().as_str(), filter.list("Value").unwrap()),
            ("n", vec!["v".into()])
        );
        filter.done().unwrap();
        assert_eq!(p.structure("E").unwrap().required("Id").unwrap(), "i");
        assert!(p.structure("E").is_none());
        let left = p.done().unwrap_err();
        assert_eq!(
            (left.code.as_str(), left.message.as_str()),
            ("UnknownParameter", "The parameter Left.1.More is not recognized")
        );
    }

    #[test]
    fn each_error_has_its_code() {
        let code = |result: Result<()>| result.unwrap_err().code;
        assert_eq!(code(params("A=1").required("B").map(drop)), "MissingParameter");
        assert_eq!(code(params("B=").required("B").map(drop)), "MissingParameter");
        assert_eq!(code(params("B=yes").boolean("B").map(drop)), "InvalidParameterValue");
        assert_eq!(code(params("B=-1").integer("B").map(drop)), "InvalidParameterValue");
        assert_eq!(code(params("L.2=b").list("L").map(drop)), "InvalidParameterValue");
        assert_eq!(code(params("L.1.x=b").list("L").map(drop)), "InvalidParameterValue");
        assert_eq!(code(params("L.1=b").structures("L").map(drop)), "InvalidParameterValue");
        assert_eq!(code(params("L.x=b").list("L").map(drop)), "UnknownParameter");
        assert_eq!(code(Params::parse(b"A=1&A=2").map(drop)), "InvalidParameterCombination");
    }
}
