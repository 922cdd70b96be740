<?php

// Every golden message is read and written as protocol/vectors says, and every name is the same.

declare(strict_types=1);

use Durable\Worker\Json;
use Durable\Worker\Messages;
use Durable\Worker\Names;
use Durable\Worker\Unreadable;

$folder = (getenv('PROTOCOL_FOLDER') ?: __DIR__ . '/../../../protocol') . '/vectors';
$load = static fn (string $file): stdClass => Json::decode((string) file_get_contents("$folder/$file"));

/** An error that says its defaults says nothing more than one that leaves them out. */
$withoutDefaults = static function (mixed $message): mixed {
    if ($message instanceof stdClass && ($message->error ?? null) instanceof stdClass) {
        foreach (['code' => 'error', 'type' => '', 'retryable' => true] as $key => $default) {
            if (($message->error->{$key} ?? null) === $default) {
                unset($message->error->{$key});
            }
        }
    }

    return $message;
};

$seen = [];
foreach (glob("$folder/*.json") as $path) {
    $file = basename($path);
    $vectors = $load($file);
    if (!isset($vectors->schema)) {
        continue;
    }
    $message = $seen[] = basename($vectors->schema, '.json');
    foreach ($vectors->valid as $vector) {
        test("$message: $vector->name is read, and written back", static function () use ($message, $vector, $withoutDefaults): void {
            $given = Json::encode($vector->message);
            $written = Json::encode(Messages::read($message, Json::decode($given)));
            $expected = Json::decode(Json::encode($vector->read ?? $vector->message));
            same($withoutDefaults($expected), $withoutDefaults(Json::decode($written)));
            same(Json::decode($written), Messages::read($message, Json::decode($written)));
        });
    }
    foreach ($vectors->invalid as $vector) {
        test("$message: $vector->name is refused", static function () use ($message, $vector): void {
            throws(Unreadable::class, static fn () => Messages::read($message, $vector->message));
        });
    }
}

test('there are vectors for every message', static function () use ($seen): void {
    $all = Messages::ALL;
    sort($all);
    sort($seen);
    same($all, $seen);
});

test('a turn is told from a task by its shape', static function () use ($load): void {
    foreach (['remote-task.json' => false, 'workflow-task.json' => true] as $file => $turn) {
        foreach ($load($file)->valid as $vector) {
            same($turn, Messages::readTask($vector->message)[0], $vector->name);
        }
    }
});

test('routing tokens are spelled as everywhere', static function () use ($load): void {
    foreach ($load('routing.json')->tokens as $golden) {
        same($golden->token, Names::token($golden->name, $golden->partition));
    }
});

test('queues and tables are named as everywhere', static function () use ($load): void {
    foreach ($load('names.json')->names as $golden) {
        $prefix = Names::prefix($golden->given->prefix, $golden->given->namespace);
        $token = Names::token($golden->given->name, $golden->given->partition);
        same($golden->prefix, $prefix);
        same($golden->token, $token);
        same($golden->tasks, Names::tasks($prefix, $token));
        same($golden->results, Names::results($prefix));
        same($golden->decisions, Names::decisions($prefix));
        same($golden->dead, Names::dead($prefix));
        same($golden->tasksTable, Names::tasksTable($prefix));
        same($golden->resultsTable, Names::resultsTable($prefix));
    }
});

test('names for SQS are spelled as everywhere', static function () use ($load): void {
    foreach ($load('names.json')->sqs as $golden) {
        same($golden->sqs, Names::sqs($golden->name));
    }
    same(['durable-results'], Names::sqsNames('durable-results'));
    same(['a.b', 'a_x2E_b'], Names::sqsNames('a.b'));
    same(['a_x5F_x2E_b'], Names::sqsNames('a_x2E_b'));
});

test('a prefix that no queue can bear is refused', static function (): void {
    foreach (['', 'a:b', 'a b'] as $prefix) {
        throws(ValueError::class, static fn () => Names::prefix($prefix));
    }
});
