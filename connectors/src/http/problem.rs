//! Problem documents as answers of this surface.

use actix_web::body::BoxBody;
use actix_web::http::{StatusCode, header};
use actix_web::{HttpResponse, HttpResponseBuilder, ResponseError};

pub use crate::requests::problem::{KINDS, Kind, MEDIA_TYPE, Problem};

fn status(kind: Kind) -> StatusCode {
    StatusCode::from_u16(kind.status()).expect("the table of kinds holds valid statuses")
}

impl ResponseError for Problem {
    fn status_code(&self) -> StatusCode {
        status(self.kind())
    }

    fn error_response(&self) -> HttpResponse<BoxBody> {
        let mut response = HttpResponseBuilder::new(status(self.kind()));
        response.content_type(MEDIA_TYPE);
        for (name, value) in self.headers() {
            response.insert_header((header::HeaderName::from_static(name), value.as_str()));
        }
        response.body(self.body())
    }
}

/// The problem for a status that the framework answered by itself.
pub(super) fn of_status(status: StatusCode) -> Problem {
    let kind = KINDS
        .iter()
        .find(|(kind, ..)| kind.status() == status.as_u16())
        .map(|(kind, ..)| *kind)
        .unwrap_or(if status.is_server_error() { Kind::Internal } else { Kind::Invalid });
    Problem::new(kind, format!("the request was refused with status {}", status.as_u16()))
}
