<?php

// Loads the classes where Composer is not used.

declare(strict_types=1);

spl_autoload_register(static function (string $class): void {
    if (str_starts_with($class, 'Durable\\Worker\\')) {
        $path = __DIR__ . '/src/' . str_replace('\\', '/', substr($class, 15)) . '.php';
        if (is_file($path)) {
            require $path;
        }
    }
});
