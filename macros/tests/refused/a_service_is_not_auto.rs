#[hopline::service]
auto trait Demo {}

fn main() {}
