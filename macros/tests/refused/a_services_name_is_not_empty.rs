#[hopline::service(name = "")]
trait Demo {
    async fn put(&self);
}

fn main() {}
