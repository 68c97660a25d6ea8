//! todo
fn main(){}
