#[hopline::service]
trait Demo {
    async fn new(&self);
}

fn main() {}
