//! General path: any accepted format, recognised by its members.
//!
//! The order of the questions matters only for objects that carry the marks of two formats: a
//! CloudEvent is one whatever else it has; span attributes and LiteLLM's names come before the
//! native format, which ignores members it does not know and would see no usage in them.

use meterr_operators::event::{Event, Rejection};

use super::json::Object;
use super::native::{self, Envelope};
use super::{cloudevents, litellm, otel};

/// Reads one JSON object of any format.
pub(super) fn decode(text: &str) -> Result<Event<'_>, Rejection> {
    let object = Object::parse(text)?;
    if cloudevents::recognised(&object) {
        return cloudevents::decode(&object);
    }
    decode_object(&object, Envelope::default())
}

/// Reads an object that is no CloudEvent; `envelope` has what one around it says.
pub(super) fn decode_object<'a>(
    object: &Object<'a>,
    envelope: Envelope<'a>,
) -> Result<Event<'a>, Rejection> {
    if let Some(attributes) = otel::attributes(object)? {
        return otel::decode(object, &attributes, envelope);
    }
    if litellm::recognised(object) {
        return litellm::decode(object, envelope);
    }
    native::decode(object, envelope)
}
