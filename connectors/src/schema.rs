//! Checks values against the schemas of the documents that describe our surfaces, in tests. Knows the
//! keywords those documents use and refuses others, so that none is written there in vain.

use std::collections::BTreeSet;

use serde_json::Value;

/// Follows a `$ref`, if there is one.
pub(crate) fn followed<'a>(document: &'a Value, value: &'a Value) -> &'a Value {
    match value.get("$ref") {
        None => value,
        Some(target) => {
            let target = target.as_str().unwrap().strip_prefix('#').unwrap();
            document.pointer(target).unwrap_or_else(|| panic!("{target} is not there"))
        }
    }
}

/// Adds the targets of all references in a value.
pub(crate) fn references<'a>(value: &'a Value, found: &mut BTreeSet<&'a str>) {
    match value {
        Value::Object(members) => {
            if let Some(Value::String(target)) = members.get("$ref") {
                found.insert(target);
            }
            members.values().for_each(|value| references(value, found));
        }
        Value::Array(values) => values.iter().for_each(|value| references(value, found)),
        _ => {}
    }
}

/// Panics when a value is not as a schema of the document says.
#[track_caller]
pub(crate) fn valid(document: &Value, schema: &Value, value: &Value, place: &str) {
    if let Err(problem) = check(document, schema, value) {
        panic!("{place}: {problem} in {value}");
    }
}

fn check(document: &Value, schema: &Value, value: &Value) -> Result<(), String> {
    if schema.get("$ref").is_some() {
        return check(document, followed(document, schema), value);
    }
    for (keyword, rule) in schema.as_object().unwrap() {
        let number = |rule: &Value| rule.as_i64().unwrap();
        let holds = match keyword.as_str() {
            "description" | "default" | "format" => true,
            "type" => {
                let is = |name: &str| match name {
                    "null" => value.is_null(),
                    "boolean" => value.is_boolean(),
                    "integer" => value.is_i64() || value.is_u64(),
                    "number" => value.is_number(),
                    "string" => value.is_string(),
                    "array" => value.is_array(),
                    "object" => value.is_object(),
                    other => panic!("type {other:?}"),
                };
                match rule {
                    Value::String(name) => is(name),
                    names => {
                        names.as_array().unwrap().iter().any(|name| is(name.as_str().unwrap()))
                    }
                }
            }
            "enum" => rule.as_array().unwrap().contains(value),
            "pattern" => {
                let pattern = regex_lite::Regex::new(rule.as_str().unwrap()).unwrap();
                value.as_str().is_none_or(|text| pattern.is_match(text))
            }
            "minLength" => value.as_str().is_none_or(|t| t.chars().count() as i64 >= number(rule)),
            "maxLength" => value.as_str().is_none_or(|t| t.chars().count() as i64 <= number(rule)),
            "minimum" => value.as_i64().is_none_or(|n| n >= number(rule)),
            "maximum" => value.as_i64().is_none_or(|n| n <= number(rule)),
            "minItems" => value.as_array().is_none_or(|a| a.len() as i64 >= number(rule)),
            "maxItems" => value.as_array().is_none_or(|a| a.len() as i64 <= number(rule)),
            // In the dialect of AsyncAPI a list says what stands at each place.
            "items" if rule.is_array() => {
                for (rule, item) in rule
                    .as_array()
                    .into_iter()
                    .flatten()
                    .zip(value.as_array().into_iter().flatten())
                {
                    check(document, rule, item)?;
                }
                true
            }
            "additionalItems" => {
                let places = schema["items"].as_array().unwrap().len();
                assert_eq!(rule, &Value::Bool(false));
                value.as_array().is_none_or(|items| items.len() <= places)
            }
            "items" => {
                for item in value.as_array().into_iter().flatten() {
                    check(document, rule, item)?;
                }
                true
            }
            "oneOf" => {
                let rules = rule.as_array().unwrap().iter();
                rules.filter(|rule| check(document, rule, value).is_ok()).count() == 1
            }
            "required" => value.as_object().is_none_or(|members| {
                rule.as_array()
                    .unwrap()
                    .iter()
                    .all(|name| members.contains_key(name.as_str().unwrap()))
            }),
            "properties" => {
                for (name, member) in value.as_object().into_iter().flatten() {
                    if let Some(rule) = rule.get(name) {
                        check(document, rule, member)?;
                    }
                }
                true
            }
            "additionalProperties" => {
                let known = schema.get("properties");
                for (name, member) in value.as_object().into_iter().flatten() {
                    match (known.and_then(|known| known.get(name)), rule) {
                        (Some(_), _) | (None, Value::Bool(true)) => {}
                        (None, Value::Bool(false)) => {
                            return Err(format!("{name} is not described"));
                        }
                        (None, rule) => check(document, rule, member)?,
                    }
                }
                true
            }
            other => panic!("keyword {other:?} is not known to this test"),
        };
        if !holds {
            return Err(format!("{keyword} {rule} does not hold for {value}"));
        }
    }
    Ok(())
}
